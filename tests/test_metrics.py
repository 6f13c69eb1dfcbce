"""What GET /metrics says, and that the dashboard and the alerts ask for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from colours import ColourModel, paint
from prometheus_client.parser import text_string_to_metric_families
from serving import serving
from starlette.testclient import TestClient

from app.web.api import create_app
from app.web.guard import Answered, Rules
from app.web.limits import Load
from app.web.metrics import REASONS, STAGES, Metrics
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.images import image_id
from clipkit.index import refresh_snapshot
from clipkit.search import SearchResult

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "app" / "monitoring"
HOST = "http://127.0.0.1:7860"
LATENCY = "clipkit_http_request_duration_seconds"
SECRET = "a token of the tests"

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]  # by name, by sorted labels


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Three pictures, and a file that is none."""
    photos = tmp_path / "photos"
    for colour in ("red", "green", "blue"):
        paint(photos / f"{colour}.png", colour)
    (photos / "broken.png").write_bytes(b"no picture")
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [photos], encoder=ColourModel())
    return tmp_path / "index"


@pytest.fixture
def workspace(index: Path) -> Iterator[Workspace]:
    opened = Workspace(index, ColourModel())  # type: ignore[arg-type]
    yield opened
    opened.close()


def client_of(workspace: Workspace, **rules: Any) -> TestClient:
    app = create_app(workspace, rules=replace(Rules(), **rules))
    return TestClient(app, base_url=HOST, raise_server_exceptions=False)


def scraped(client: TestClient, **headers: str) -> Samples:
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"clipkit_{name}"][tuple(sorted(labels.items()))]


# ---- requests


def test_requests_count_by_route_and_status(workspace: Workspace, tmp_path: Path) -> None:
    client = client_of(workspace)
    red = image_id((tmp_path / "photos" / "red.png").read_bytes())
    client.get(f"/thumbnails/{red}")
    client.get(f"/thumbnails/{'0' * 32}")
    counts = scraped(client)[f"{LATENCY}_count"]
    route = ("route", "/thumbnails/{image_id}")
    assert counts[(("method", "GET"), route, ("status", "200"))] == 1
    assert counts[(("method", "GET"), route, ("status", "404"))] == 1
    assert value(scraped(client), "http_response_bytes_total") > 0


def test_no_request_makes_a_new_series_by_what_it_asks_for(workspace: Workspace) -> None:
    client = client_of(workspace)

    def ask(number: int) -> int:
        client.get(f"/nothing/{number}")
        client.get(f"/thumbnails/{number:032x}")
        client.get(f"/thumbnails/{number}")
        client.request(f"METHOD{number}", "/health")
        return sum(len(series) for series in scraped(client).values())

    ask(0)
    before = ask(1)  # the second time, /metrics has been answered once
    assert [ask(number) for number in range(2, 20)] == [before] * 18


def test_rejections_count_by_reason(workspace: Workspace) -> None:
    client = client_of(workspace, token=SECRET)
    header = {"authorization": f"Bearer {SECRET}"}
    assert client.get("/health").status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/nothing", headers=header).status_code == 404
    large = b"x" * 5_000_000
    assert client.post("/api/v1/marks", content=large, headers=header).status_code == 413
    found = scraped(client, **header)["clipkit_http_rejections_total"]
    counts = {dict(labels)["reason"]: count for labels, count in found.items()}
    assert counts == dict.fromkeys(REASONS, 0) | {"no_token": 2, "no_route": 1, "too_large": 1}


def answered(**changes: Any) -> Answered:
    facts = {
        "client": "a", "method": "GET", "route": "/x", "path": "/x", "query": None, "status": 200,
        "bytes": 10, "seconds": 0.02,
    }  # fmt: skip
    known = {name: facts.get(name) for name in Answered.__dataclass_fields__}
    return Answered(**{**known, **changes})


def test_the_clients_own_mistakes_and_event_streams_are_left_out(workspace: Workspace) -> None:
    metrics = Metrics(workspace, Load())
    metrics.answered(answered(status=400))  # say, a query with a wrong date
    metrics.answered(answered(status=404))  # a picture that is not there
    metrics.answered(answered(route="/gradio_api/queue/data", seconds=900.0))
    metrics.answered(answered(status=0))  # the client went away
    metrics.rejected("something else")
    found = page(metrics)
    assert sum(found["clipkit_http_rejections_total"].values()) == 1
    assert value(found, "http_rejections_total", reason="other") == 1
    assert sum(found[f"{LATENCY}_count"].values()) == 2
    assert value(found, "http_response_bytes_total") == 40


def page(metrics: Metrics) -> Samples:
    return samples(bytes(metrics._page().body).decode())


def test_load_is_read_when_asked(workspace: Workspace) -> None:
    load = Load()
    metrics = Metrics(workspace, load)
    load.active, load.waiting = 3, 2
    found = page(metrics)
    assert (value(found, "http_requests_active"), value(found, "http_requests_waiting")) == (3, 2)


def test_the_request_that_asks_is_at_work(workspace: Workspace) -> None:
    client = client_of(workspace)
    for _ in range(2):  # each place is given back
        found = scraped(client)
        assert value(found, "http_requests_active") == 1
        assert value(found, "http_requests_waiting") == 0


# ---- searches


def test_a_search_counts_with_its_stages(workspace: Workspace) -> None:
    metrics = Metrics(workspace, Load())
    seconds = {"encode": 0.3, "rows": 0.2, "a new stage": 0.5}
    metrics.searched(SearchResult((), 0, seconds))
    found = page(metrics)
    assert value(found, "search_duration_seconds_sum") == pytest.approx(1.0)
    assert value(found, "search_duration_seconds_bucket", le="1.0") == 1
    assert value(found, "search_duration_seconds_bucket", le="0.5") == 0
    assert value(found, "search_stage_duration_seconds_sum", stage="encode") == 0.3
    assert value(found, "search_stage_duration_seconds_sum", stage="other") == 0.5


def search(client: TestClient, words: str) -> None:
    assert client.post("/api/v1/search", json={"query": words}).status_code == 200


def test_every_stage_of_a_real_search_is_known(workspace: Workspace) -> None:
    client = client_of(workspace)
    search(client, "red")
    search(client, "path:red")
    found = scraped(client)
    assert value(found, "search_duration_seconds_count") == 2
    stages = {
        dict(labels)["stage"] for labels in found["clipkit_search_stage_duration_seconds_sum"]
    }
    assert stages
    assert stages <= set(STAGES)
    parts = sum(found["clipkit_search_stage_duration_seconds_sum"].values())
    assert parts == pytest.approx(value(found, "search_duration_seconds_sum"))


# ---- the index


def test_the_index_its_model_and_its_snapshot(workspace: Workspace, index: Path) -> None:
    client = client_of(workspace)
    found = scraped(client)
    assert value(found, "index_pictures") == value(found, "index_files") == 3
    assert value(found, "index_vectors") == value(found, "index_delta_vectors") == 3
    assert value(found, "model_vectors", model="colours") == 3
    assert value(found, "model_info", model="colours", encoder_id="c010" * 4) == 1
    assert sum(found["clipkit_index_skipped_files"].values()) == 1
    assert value(found, "index_readable") == value(found, "model_ready") == 1
    assert "clipkit_snapshot_vectors" not in found
    before = time.time()
    with Catalog.open(index, write=True) as catalog:
        refresh_snapshot(catalog, ColourModel.encoder_id, force=True)
    found = scraped(client)
    assert value(found, "snapshot_vectors") == 3
    assert value(found, "index_delta_vectors") == 0
    assert value(found, "snapshot_recall_ratio") == 1
    assert before - 2 < value(found, "snapshot_created_timestamp_seconds") < time.time() + 2
    with Catalog.open(index, write=True) as catalog:
        num = catalog.add_picture(image_id="1" * 32, width=1, height=1, format="PNG", bytes=1)
        catalog.add_place(num, "/new.png", size=1, mtime_ns=1)
        vector = np.array([[1.0, 0.0, 0.0]], np.float32)
        catalog.add_vectors(ColourModel.encoder_id, np.array([num]), vector)
    found = scraped(client)
    assert (value(found, "index_vectors"), value(found, "index_delta_vectors")) == (4, 1)


def test_the_catalog_is_read_once_for_each_change(
    workspace: Workspace, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(workspace)
    reads = []
    real = Catalog.skips
    monkeypatch.setattr(Catalog, "skips", lambda self: reads.append(1) or real(self))
    scraped(client)
    scraped(client)
    assert len(reads) == 1
    with Catalog.open(index, write=True) as catalog:
        catalog.add_root("/other")
    scraped(client)
    assert len(reads) == 2


def test_without_an_index_and_with_a_damaged_one(index: Path, tmp_path: Path) -> None:
    empty = Workspace(tmp_path / "none", ColourModel())  # type: ignore[arg-type]
    assert value(scraped(client_of(empty)), "index_readable") == 1
    empty.close()
    (index / "catalog.sqlite").write_bytes(b"damaged" * 1_000)
    damaged = Workspace(index, ColourModel())  # type: ignore[arg-type]
    found = scraped(client_of(damaged))
    assert value(found, "index_readable") == 0
    assert "clipkit_index_pictures" not in found
    damaged.close()


def test_indexing_and_marks(workspace: Workspace, tmp_path: Path) -> None:
    client = client_of(workspace)
    assert value(scraped(client), "indexing_running") == 0
    for number in range(5):
        paint(tmp_path / "more" / f"{number}.png", "red", number=number + 1)
    (tmp_path / "more" / "broken.png").write_bytes(b"nor is this")
    workspace.index([str(tmp_path / "more")])
    assert workspace._indexer._thread is not None
    workspace._indexer._thread.join()
    found = scraped(client)
    assert value(found, "indexing_running") == 0
    assert value(found, "indexing_files_done") == value(found, "indexing_files_expected") == 6
    assert value(found, "indexing_files_skipped") == 1
    assert sum(found["clipkit_index_skipped_files"].values()) == 2
    red = image_id((tmp_path / "photos" / "red.png").read_bytes())
    client.post("/api/v1/marks", json={"image_id": red, "query": "red", "right": True})
    assert value(scraped(client), "marks") == 1


# ---- the files of app/monitoring


def alert_expressions() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return loaded


def panel_expressions() -> list[str]:
    found = dashboard()
    panels = [target["expr"] for panel in found["panels"] for target in panel.get("targets", ())]
    return panels + [one["expr"] for one in found["annotations"]["list"]]


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:clipkit|process)_\w+", expression))


def exercised(client: TestClient, index: Path) -> Samples:
    """Everything that /metrics can say has a value now."""
    with Catalog.open(index, write=True) as catalog:
        refresh_snapshot(catalog, ColourModel.encoder_id, force=True)
    search(client, "red")
    return scraped(client)


def test_rules_and_panels_name_metrics_that_exist(workspace: Workspace, index: Path) -> None:
    client = client_of(workspace)
    known = set(exercised(client, index))
    expressions = alert_expressions() + panel_expressions()
    names = set().union(*map(metric_names, expressions))
    assert len(names) > 20
    assert names <= known
    # and nothing of clipkit's is measured that no panel shows
    measured = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if "clipkit" in name}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert measured <= shown


def test_the_dashboard_is_complete() -> None:
    found = dashboard()
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    variables = {one["name"] for one in found["templating"]["list"]} | {"__rate_interval", "__all"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(found)))
    assert used <= variables
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_files_are_part_of_the_package() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for glob in tools["package-data"]["app"] for path in (ROOT / "app").glob(glob)}
    assert {
        MONITORING / name for name in ("alerts.yml", "dashboard.json", "prometheus.yml")
    } <= packed


def test_alerts_go_by_their_names() -> None:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    tested = (ROOT / "tests" / "alerts.test.yml").read_text()
    for rule in groups[0]["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["alert"] in tested or rule["alert"] == "ClipkitSnapshotOld"  # by a count there


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian: apt install prometheus)")
    return path


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "app/monitoring/alerts.yml"),
        ("check", "config", "--syntax-only", "app/monitoring/prometheus.yml"),
        ("test", "rules", "tests/alerts.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [needs("promtool"), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_better_in_the_names(workspace: Workspace, index: Path) -> None:
    client = client_of(workspace)
    exercised(client, index)
    text = client.get("/metrics").text
    done = subprocess.run(
        [needs("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.prometheus
@pytest.mark.end_to_end
def test_a_real_prometheus_scrapes_a_real_server(index: Path, tmp_path: Path) -> None:
    """With the token by the shipped configuration; every rule and panel can be evaluated."""
    program = needs("prometheus")
    with Catalog.open(index, write=True) as catalog:
        refresh_snapshot(catalog, ColourModel.encoder_id, force=True)
    with serving(tmp_path, secret=SECRET, token=True) as server:
        assert server.get("/metrics")[0] == 401
        header = {"authorization": f"Bearer {SECRET}"}
        assert server.post("/api/v1/search", {"query": "red"}, **header)[0] == 200
        with prometheus(program, tmp_path / "prometheus", target=server.port) as ask:
            # the second scrape has counted the first
            until(lambda: ask(f'{LATENCY}_count{{route="/metrics",status="200"}}'))
            assert numbers(ask('up{job="clipkit"}')) == [1]
            assert numbers(ask("clipkit_index_pictures")) == [3]
            assert numbers(ask("clipkit_snapshot_recall_ratio")) == [1]
            assert numbers(ask("clipkit_search_duration_seconds_count")) == [1]
            # the refused scrape above, without a token
            assert numbers(ask('clipkit_http_rejections_total{reason="no_token"}')) == [1]
            for expression in panel_expressions():
                plain = expression.replace("$__rate_interval", "1m")
                ask(re.sub(r"\$\w+", ".*", plain))
            rules = ask.rules()
            assert {rule["name"] for rule in rules} >= {"ClipkitDown", "ClipkitErrors"}
            until(lambda: all(rule["health"] == "ok" for rule in ask.rules()))
            assert [rule["name"] for rule in ask.rules() if rule["state"] != "inactive"] == []


class Asking:
    """The HTTP API of a Prometheus."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1"

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._base}/{path}", timeout=10) as answer:
            read = json.load(answer)
        assert read["status"] == "success", read
        return read["data"]

    def __call__(self, expression: str) -> list[Any]:
        found: list[Any] = self._get(f"query?{urllib.parse.urlencode({'query': expression})}")[
            "result"
        ]
        return found

    def rules(self) -> list[Any]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def ready(self) -> bool:
        try:
            return bool(self._get("status/buildinfo"))
        except OSError:
            return False


class prometheus:  # noqa: N801
    """A Prometheus with the shipped configuration, which scrapes `target` every second."""

    def __init__(self, program: str, folder: Path, *, target: int) -> None:
        folder.mkdir()
        shutil.copy(MONITORING / "alerts.yml", folder)
        config = (MONITORING / "prometheus.yml").read_text()
        config = config.replace(" 15s", " 1s").replace("127.0.0.1:7860", f"127.0.0.1:{target}")
        (folder / "prometheus.yml").write_text(config)
        (folder / "clipkit.token").write_text(SECRET)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._command = [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]

    def __enter__(self) -> Asking:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ask = Asking(self._port)
        until(ask.ready)
        return ask

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def until(condition: Any) -> None:
    """Wait for what comes in its own time; the test's own timeout ends it."""
    while not condition():
        time.sleep(0.2)


def numbers(result: list[Any]) -> list[float]:
    return [float(series["value"][1]) for series in result]
