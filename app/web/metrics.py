"""What Prometheus reads at GET /metrics: requests, searches, the index, indexing, the process.

Names follow Prometheus's conventions: base units, `_total` for counters, `_info` for labels that are
facts. The number of series is bounded: labels are route templates, statuses, stages, reasons of a
fixed list or of the catalog, and the models of the index. app/monitoring has a dashboard and alerts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from app.web.limits import Load
from app.web.workspace import Workspace
from clipkit import __version__
from clipkit.catalog import Catalog
from clipkit.errors import ClipkitError
from clipkit.index import read_manifest
from clipkit.index.building import RECALL_GOAL
from clipkit.search import SearchResult
from clipkit.wording import printable

if TYPE_CHECKING:
    from app.web.guard import Answered

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT")
STREAM = (
    "/queue/data"  # Gradio's event stream lasts as long as the page is open: that is no latency
)
# Requests that were refused for what they are, not for what they ask: by status, whatever the route ...
REJECTIONS = {
    401: "no_token",
    403: "not_allowed",
    408: "slow_body",
    413: "too_large",
    414: "too_large",
    429: "too_many",
    503: "busy",
}
# ... and if no route was reached.
UNROUTED = {400: "malformed", 404: "no_route"}
REASONS = (*dict.fromkeys((*REJECTIONS.values(), *UNROUTED.values())), "other")
STAGES = ("load", "encode", "filter", "scan", "search", "rescore", "rows")


class Metrics:
    """The metrics of one app, in a registry of its own. Threads may share it."""

    def __init__(self, workspace: Workspace, load: Load) -> None:
        disable_created_metrics()  # a second series beside every counter, which nothing here uses
        self.registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "clipkit_http_request_duration_seconds",
            "Time from a request's arrival to the end of its answer",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._sent = Counter(
            "clipkit_http_response_bytes", "Bytes of answers' bodies", registry=registry
        )
        self._rejected = Counter(
            "clipkit_http_rejections",
            "Requests that were refused: without a token, too large, too many, ...",
            ("reason",),
            registry=registry,
        )
        for reason in REASONS:  # there from the start, so that the first one is an increase
            self._rejected.labels(reason)
        self._searches = Histogram(
            "clipkit_search_duration_seconds",
            "Time of a search, HTTP and page aside",
            buckets=SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "clipkit_search_stage_duration_seconds",
            "Time of a search's stages: loading new vectors, encoding, filtering, scanning, rows",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        for name, what in (("active", "at work"), ("waiting", "that wait for a place")):
            requests = Gauge(f"clipkit_http_requests_{name}", f"Requests {what}", registry=registry)
            requests.set_function(partial(getattr, load, name))
        ProcessCollector(registry=registry)
        registry.register(_LibraryCollector(workspace))
        self.router = APIRouter()
        self.router.add_api_route("/metrics", self._page, include_in_schema=False)

    def answered(self, request: Answered) -> None:
        """Count a request that is over. This is an observer of the guard."""
        self._sent.inc(request.bytes)
        reason = REJECTIONS.get(request.status)
        if reason is None and request.route == "-":
            reason = UNROUTED.get(request.status)
        if reason is not None:
            self.rejected(reason)
        if request.status and not request.route.endswith(STREAM):
            method = request.method if request.method in METHODS else "other"
            labels = self._requests.labels(method, request.route, str(request.status))
            labels.observe(request.seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused, for one of REASONS; anything else counts as "other"."""
        self._rejected.labels(reason if reason in REASONS else "other").inc()

    def searched(self, result: SearchResult) -> None:
        """Count a search and its stages."""
        self._searches.observe(sum(result.seconds.values()))
        for stage, seconds in result.seconds.items():
            self._stages.labels(stage if stage in STAGES else "other").observe(seconds)

    def _page(self) -> Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"}
        return Response(generate_latest(self.registry), headers=headers)


class _LibraryCollector(Collector):
    """What the catalog and the workspace know, read when Prometheus asks for it.

    What a catalog holds is read again only when its change counter has moved.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lock = threading.Lock()  # two that ask at once read the catalog once
        self._held: tuple[Catalog, int, list[GaugeMetricFamily]] | None = None

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # else registering would read the catalog

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = None
        families: list[GaugeMetricFamily] = []
        try:
            contents = self._workspace.contents()
            if contents.catalog is not None:
                families = self._index(contents.catalog, contents.changes)
            status = self._workspace.status(contents)
        except ClipkitError:
            pass  # clipkit_index_readable says so
        yield from families
        yield gauge("index_readable", "Whether the index can be read", float(status is not None))
        yield facts("build_info", "The version of clipkit", {"version": __version__})
        if status is not None:
            yield gauge("marks", "Marks of results as right or wrong", status.corrections)
            yield gauge("model_ready", "Whether the model is loaded", status.model == "ready")
        yield from self._indexing()

    def _index(self, catalog: Catalog, changes: int) -> list[GaugeMetricFamily]:
        with self._lock:
            if self._held is None or self._held[:2] != (catalog, changes):
                self._held = catalog, changes, list(_index_families(catalog))
            return self._held[2]

    def _indexing(self) -> Iterator[GaugeMetricFamily]:
        run, busy = self._workspace.run, self._workspace.indexing
        progress = run.progress if run else None
        yield gauge("indexing_running", "Whether this server is indexing", busy)
        for name, what, value in (
            ("files_done", "Files of the run that are done", progress and progress.done),
            ("files_expected", "Files that the run has to do", progress and progress.total),
            ("files_skipped", "Files that the run skipped", progress and progress.skipped),
            ("files_per_second", "Speed of the run", progress and busy and progress.rate),
        ):
            yield gauge(f"indexing_{name}", what, value or 0)


def _index_families(catalog: Catalog) -> Iterator[GaugeMetricFamily]:
    active = catalog.active_encoder()
    stats = catalog.stats(active.encoder_id if active else None)
    yield gauge("index_pictures", "Pictures that can be searched", stats.pictures)
    yield gauge("index_files", "Files of these pictures", stats.places)
    yield gauge("index_picture_bytes", "Bytes of these pictures' files", stats.bytes)
    yield gauge("index_vectors", "Pictures with a vector of the active model", stats.vectors)
    if stats.newest:
        newest = datetime.fromisoformat(stats.newest).timestamp()
        yield gauge("index_last_added_timestamp_seconds", "When a picture was last added", newest)
    yield labelled("index_skipped_files", "Files not indexed", "reason", catalog.skips())
    rows = {
        printable(row.spec): catalog.stats(row.encoder_id).vectors for row in catalog.encoders()
    }
    yield labelled("model_vectors", "Pictures with a vector of a model", "model", rows)
    if active is None:
        return
    model = {"model": printable(active.spec), "encoder_id": active.encoder_id[:16]}
    yield facts("model_info", "The model that answers", model)
    pointer = catalog.snapshot(active.encoder_id)
    delta = stats.vectors
    if pointer is not None:
        delta = catalog.count_vectors(active.encoder_id, after_seq=pointer.last_seq)
    yield gauge("index_delta_vectors", "Vectors that are not in the snapshot", delta)
    if pointer is None:
        return
    folder = catalog.folder / "snapshots" / pointer.name
    try:
        manifest = read_manifest(folder)
        built = (folder / "manifest.json").stat().st_mtime
    except (ClipkitError, OSError):
        return  # it is not searched either
    yield gauge("snapshot_vectors", "Vectors of the snapshot", manifest.size)
    yield gauge("snapshot_size_bytes", "Bytes of the snapshot on the disk", manifest.bytes)
    yield gauge("snapshot_created_timestamp_seconds", "When the snapshot was made", built)
    yield gauge("snapshot_build_seconds", "How long making it took", manifest.build_seconds)
    recall = manifest.recall_at_10
    yield gauge("snapshot_recall_ratio", "Its measured recall@10 against exact search", recall)
    yield gauge("snapshot_recall_goal_ratio", "The recall@10 that is to be reached", RECALL_GOAL)


def gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"clipkit_{name}", what, value=float(value))


def facts(name: str, what: str, labels: Mapping[str, str]) -> GaugeMetricFamily:
    """Return a metric of value 1 whose labels carry the facts."""
    family = GaugeMetricFamily(f"clipkit_{name}", what, labels=list(labels))
    family.add_metric(list(labels.values()), 1.0)
    return family


def labelled(name: str, what: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"clipkit_{name}", what, labels=[label])
    for value, number in values.items():
        family.add_metric([value], float(number))
    return family
