"""The page: Gradio's blocks, events and queue around our own HTML.

The only module that knows Gradio. The page is HTML components whose values render.py makes;
clipkit.js sends events ("evaluate", "index", "stop", "dismiss", "refresh") and shows what comes back;
searches do not come this way, but through api.py. No event
takes a component as its input and no component handles files, so that Gradio never resolves a path
that a browser sends; guard.py lets none of its file routes through, nor an event with an input.
Pictures go out by content hash.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.web import render
from app.web.api import FAULT, create_app
from app.web.folders import path_of
from app.web.guard import Rules
from app.web.indexing import Run
from app.web.routes import STATIC
from app.web.saved_reports import SavedReports
from app.web.sorting import Group, Sorter, Sorting, SortRequest
from app.web.workspace import Contents, Workspace
from clipkit.errors import ClipkitError, InputError
from clipkit.index_models import OWN_MODELS

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

EXAMPLES = ("birthday cake", "a red car", "penguin", "someone playing guitar", "a house in snow")
QUEUE = 64  # events that may wait; more are refused
SORTINGS_EACH = 2  # of one client at a time, of all that Workspace.classifying lets in
TURNS_TAKEN = (
    f"{SORTINGS_EACH} classifications from this address are in progress; wait for one to end"
)
UNREAD = 30  # messages for a page that does not fetch them
SESSIONS = 4_000  # of which Gradio's queue remembers something; it keeps the messages of 2,000
TICK_SECONDS = 0.7  # between updates while something changes by itself

SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Gradio makes statistics of all past events after each one; nobody reads them here.
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
}
# Gradio lets Python listen to the events whose names stand in quotes here.
ON_LOAD = "clipkit.attach(element, trigger); // 'evaluate' 'index' 'stop' 'dismiss' 'refresh'"


class Page:
    """The HTML that each part of the page shows now."""

    def __init__(
        self,
        workspace: Workspace,
        sorter: Sorter,
        reports: SavedReports,
    ) -> None:
        self.workspace = workspace
        self.sorter = sorter
        self.reports = reports
        self._filters: tuple[Contents, str] | None = None  # the last drawn

    def tick(self) -> tuple[str, str, str]:
        """Return what a page shows first and what changes by itself: status, filters and run.

        While the catalog stays as it is, this costs one look at its change counter.
        """
        try:
            contents = self.workspace.contents()
            return self.status(contents), self._filters_of(contents), self.run()
        except ClipkitError:
            return "", "", self.run()

    def status(self, contents: Contents | None = None) -> str:
        try:
            return render.part("status", status=self.workspace.status(contents))
        except ClipkitError:
            return ""

    def run(self) -> str:
        return "" if self.workspace.read_only else render.run(self.workspace.run)

    def change_run(self, change: Callable[[], None]) -> str:
        """Stop or dismiss the run and return it; the reason if the page may not."""
        try:
            change()
        except ClipkitError as error:
            return render.run(Run(folders=(), error=str(error), over=True))
        return self.run()

    def sort(self, data: Mapping[str, Any], *, error: str = "") -> tuple[str, str]:
        """Return the Classify page, with the result if the browser sent words, and the status.

        The page is a <template> in an element of its own name: clipkit.js takes it from there into the
        results, which Gradio does not know.
        "group" is the number of the one group to show, and "k" how many of its pictures. With `error`
        nothing is sorted: the page says why.
        """
        fields = {key: str(data.get(key) or "") for key in ("words", "choice", "floor", "ticket")}
        sorting, only = None, None
        if fields["words"].strip() and not error:
            try:
                sorting = self.sorter.sort(SortRequest.from_page(data))
                only = self._group(sorting, data)
            except ClipkitError as caught:
                error = str(caught)
            except Exception:  # the person reads a sentence, the terminal has the traceback
                log.exception("sorting failed")
                error = FAULT
        page = render.sort_page(
            fields, reports=self.reports.rows(), sorting=sorting, only=only, error=error
        )
        ticket = fields["ticket"] if fields["ticket"].isdecimal() else "0"
        return f"<answer-{ticket}><template>{page}</template></answer-{ticket}>", self.status()

    def _group(self, sorting: Sorting, data: Mapping[str, Any]) -> Group | None:
        """Return the group that the browser asks for alone, with as many of its pictures as it wants."""
        group, k = data.get("group"), data.get("k") or render.GROUP_PAGE
        groups = [one for one in sorting.groups if one.number == group and group is not None]
        if not groups or not isinstance(k, int) or k < 1:
            return None
        most = min(k, render.GROUP_MOST)
        return replace(groups[0], best=self.sorter.best(sorting, groups[0].number, most))

    def index(self, data: Mapping[str, Any]) -> str:
        """Start to index a folder, typed or chosen by its key; return the reason if it cannot, else
        "".
        """
        folder = data.get("folder")
        try:
            if "key" in data:
                folder = path_of(data["key"])
            if not isinstance(folder, str):
                raise InputError(f"the folder is {folder!r}; it must be text")
            self.workspace.index([folder])
        except ClipkitError as error:
            return render.run(Run(folders=(str(folder),), error=str(error), over=True))
        return ""

    def _filters_of(self, contents: Contents) -> str:
        if self._filters is None or self._filters[0] is not contents:
            drawn = render.filters(contents.folders, contents.facets, contents.roots)
            self._filters = contents, drawn
        return self._filters[1]


class Turns:
    """Count long work in progress, so that one client does not keep all others waiting."""

    def __init__(self) -> None:
        self._clients: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, client: str) -> bool:
        """Count one more, unless the client has SORTINGS_EACH already; return whether it was counted."""
        with self._lock:
            if self._clients[client] >= SORTINGS_EACH:
                return False
            self._clients[client] += 1
            return True

    def end(self, client: str) -> None:
        """Count one less."""
        with self._lock:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


def forget_unread(blocks: gr.Blocks, session: str) -> None:
    """Forget messages for a page that does not fetch them: Gradio would keep them until it ends."""
    queue = blocks._queue
    messages = queue.pending_messages_per_session.get(session)
    if messages is not None and messages.qsize() > UNREAD:
        while not messages.empty():
            messages.get_nowait()
    if len(queue.pending_event_ids_session) > SESSIONS:
        for known in list(queue.pending_event_ids_session):
            if known not in queue.pending_messages_per_session:
                del queue.pending_event_ids_session[known]


def build(page: Page) -> gr.Blocks:
    """Return the page and its events, not yet served. Sets Gradio's environment variables, as there
    is no other way to configure these."""
    os.environ.update(SETTINGS)
    workspace, turns = page.workspace, Turns()
    plain: dict[str, Any] = {"apply_default_css": False, "js_on_load": None}
    script = "".join(
        f'<script src="ui/{name}?v={_version(name)}"></script>'
        for name in ("viewer.js", "clipkit.js", "panel.js", "models.js")
    )
    form = render.part(
        "ask", may_index=workspace.may_index, may_show_files=workspace.may_show_files
    )
    form += render.help_panel()

    with gr.Blocks(title="clipkit", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML(render.part("brand"), elem_id="brand", **plain)
            status = gr.HTML("", elem_id="status", **plain)
            gr.HTML(render.part("tools"), elem_id="tools", **plain)
        ask = gr.HTML(form, elem_id="ask", head=script, **{**plain, "js_on_load": ON_LOAD})
        filters = gr.HTML("", elem_id="filters", **plain)
        refusal = gr.HTML("", elem_id="refusal", **plain)
        run = gr.HTML("", elem_id="run", **plain)
        # What clipkit.js shows: it alone changes what is in there.
        gr.HTML('<div class="answers"></div>', elem_id="results", **plain)
        classified = gr.HTML("", elem_id="classified", **plain)
        timer = gr.Timer(TICK_SECONDS, active=False)

        def next_timer() -> gr.Timer:
            """Return the timer: active while something changes by itself.

            Call it before the page is drawn: a run that ends in between is then drawn as ended by
            one more tick, instead of as running for good. Whatever draws the status or the run sets the
            timer, since a slow answer may arrive after the last tick.
            """
            run = workspace.run
            fading = run is not None and not run.to_read  # in progress, or shown for a minute
            return gr.Timer(
                active=fading
                or workspace.indexing
                or workspace.model.state == "loading"
                or workspace.teacher.working
            )

        def on_evaluate(event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
            data = _data(event)
            client = request.client.host if request.client else ""
            if not turns.begin(client):
                drawn = page.sort(data, error=TURNS_TAKEN)
            else:
                try:
                    drawn = page.sort(data)
                finally:
                    turns.end(client)
            timer = next_timer()
            return *drawn, page.run(), timer

        def on_index(event: gr.EventData) -> tuple[Any, ...]:
            refused = page.index(_data(event))
            timer = next_timer()
            return refused, page.run(), page.status(), timer

        def on_stop() -> tuple[Any, ...]:
            timer = next_timer()
            return page.change_run(workspace.stop), timer

        def on_dismiss() -> tuple[Any, ...]:
            timer = next_timer()
            return page.change_run(workspace.dismiss), timer

        def on_tick() -> tuple[Any, ...]:
            timer = next_timer()
            return *page.tick(), timer

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # One after the other: an answer that was drawn before another one must not arrive after it, or
        # the page would show a run that has ended as running, and stop the timer of one that goes on.
        ordered: dict[str, Any] = {**quiet, "concurrency_id": "page", "concurrency_limit": 1}
        blocks.load(on_tick, None, [status, filters, run, timer], **ordered)
        # No limit of Gradio's: Workspace.classifying refuses at once what would fill the queue.
        ask.evaluate(
            on_evaluate,
            None,
            [classified, status, run, timer],
            trigger_mode="always_last",
            concurrency_limit=None,
            **quiet,
        )
        ask.index(on_index, None, [refusal, run, status, timer], **ordered)
        ask.stop(on_stop, None, [run, timer], **ordered)
        ask.dismiss(on_dismiss, None, [run, timer], **ordered)
        ask.refresh(on_tick, None, [status, filters, run, timer], **ordered)
        timer.tick(on_tick, None, [status, filters, run, timer], **ordered)
    blocks.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
    return blocks


def _data(event: gr.EventData) -> Mapping[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _version(name: str) -> str:
    return hashlib.blake2b(STATIC[name][0], digest_size=6).hexdigest()


def make_app(
    workspace: Workspace, *, rules: Rules | None = None, examples: Sequence[str] = EXAMPLES
) -> FastAPI:
    """Return page and API as one ASGI app; `rules` say who may ask."""
    style = f'<link rel="stylesheet" href="ui/clipkit.css?v={_version("clipkit.css")}">'
    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    sorter = Sorter(workspace)
    reports = SavedReports(taught=workspace.folder / OWN_MODELS)
    blocks = build(Page(workspace, sorter, reports))
    rules = rules or Rules(names=Rules.names_of("localhost"))
    rules = replace(rules, on_event=lambda session: forget_unread(blocks, session))
    return gr.mount_gradio_app(
        create_app(workspace, sorter=sorter, reports=reports, rules=rules, examples=examples),
        blocks,
        path="/",
        # Plain Font objects: a font given as a string is fetched from Gradio's own set.
        theme=gr.themes.Base(
            primary_hue="teal",
            font=[gr.themes.Font(name) for name in system],
            font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
        ),
        head=style,
        footer_links=[],
        run_history=False,
        # Gradio may take no upload and read nothing from the disk: its file routes had several path
        # traversals (CVE-2024-1561, CVE-2024-47164 and others). guard.py closes these routes as well.
        max_file_size="1b",
        allowed_paths=[],
        blocked_paths=[os.path.abspath(os.sep)],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
