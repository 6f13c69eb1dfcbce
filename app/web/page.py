"""The page: Gradio's blocks, events and queue around our own HTML, and the server that runs it.

The only module that knows Gradio. The page is HTML components whose values render.py makes;
clipkit.js sends four events ("ask", "evaluate", "index", "stop") and shows what comes back. No
component that handles files is used, and api.py lets none of Gradio's file routes through: pictures
go out by content hash from there.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.corrections import as_query
from app.web import render
from app.web.api import STATIC, create_app
from app.web.requests import PAGE, Ask
from app.web.sort_page import EvaluationPage
from app.web.sorting import Evaluation
from app.web.workspace import Workspace, folder_key
from clipkit.catalog import Catalog, PictureRow
from clipkit.errors import ClipkitError, InputError
from clipkit.lazy_encoder import LazyEncoder

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

EXAMPLES = ("birthday cake", "a red car", "penguin", "someone playing guitar", "a house in snow")
NEWEST = 18  # pictures shown before the first search
QUEUE = 64  # events that may wait; more are refused
TICK_SECONDS = 0.7  # between looks at a run
FAULT = "clipkit failed in a way it does not know; the terminal that runs it says more"

SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Gradio makes statistics of all past events after each one; nobody reads them here.
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
}
BRAND = (
    '<button type="button" data-do="home" aria-label="clipkit, start page">'
    '<img src="ui/clipkit.svg" alt="">clipkit</button>'
)
TOOLS = (
    '<div class="tools"><button type="button" class="plain" data-do="evaluate" '
    'title="Sort pictures into words, see reports">Sort</button>'
    '<button type="button" class="plain" data-do="add">Add pictures</button>'
    '<button type="button" class="icon" data-do="theme" title="Light or dark" '
    'aria-label="Light or dark"><i class="i-theme"></i></button></div>'
)
EMPTY = 'data-view="empty"'  # how render.empty marks itself
# Gradio lets Python listen to the events whose names stand in quotes here.
ON_LOAD = "clipkit.attach(element, trigger); // 'ask' 'evaluate' 'index' 'stop'"


class Page:
    """The HTML that each part of the page shows now."""

    def __init__(self, workspace: Workspace, examples: Sequence[str]) -> None:
        self.workspace = workspace
        self.examples = tuple(examples)

    def parts(self) -> tuple[str, str, str, str]:
        """Status, filters, run and start."""
        try:
            return self.status(), self.filters(), self.run(), self.start()
        except ClipkitError as error:
            return "", "", self.run(), render.failure(str(error))

    def status(self) -> str:
        now = self.workspace.status()
        return render.status(
            spec=now.spec,
            encoder_id=now.encoder_id,
            model=now.model,
            pictures=now.pictures,
            newest=now.newest,
        )

    def filters(self) -> str:
        return render.filters([(f, folder_key(f), n) for f, n in self.workspace.folders()])

    def start(self) -> str:
        """What is shown before anything is asked."""
        now = self.workspace.status()
        if not now.pictures:
            return render.empty(may_index=self.workspace.may_index, indexing=now.indexing)
        rows = self.workspace.newest(NEWEST)
        newest = [_card(row, rank=rank) for rank, row in enumerate(rows, 1)]
        return render.home(
            pictures=now.pictures,
            chips=self.examples,
            newest=newest,
            corrections=render.summary(now.corrections) if now.corrections else "",
        )

    def answer(self, data: Mapping[str, Any]) -> str:
        """The results of one search, or the sentence that says why there are none."""
        ticket = str(data.get("ticket", ""))
        try:
            ask = Ask.from_page(data)
            now = self.workspace.status()
            if ask.is_empty or not now.pictures:
                return self.start()
            found = self.workspace.search(ask)
        except ClipkitError as error:
            return render.failure(str(error), ticket=ticket)
        except Exception:  # the page's edge: a sentence for the person, the rest for the terminal
            log.exception("a search failed")
            return render.failure(FAULT, ticket=ticket)
        cards = [
            _card(
                hit.picture,
                rank=hit.rank,
                score=hit.score,
                strength=hit.strength,
                marks=render.buttons(hit.rank, found.said, found.marks.get(hit.picture.image_id)),
            )
            for hit in found.hits
        ]
        return render.results(
            cards,
            question=_question(ask),
            key=_key(ask),
            ticket=ticket,
            total=found.total,
            seconds=found.seconds,
            page=PAGE,
            query=as_query(found.said) if found.said else "",
            corrections=render.summary(now.corrections),
        )

    def run(self) -> str:
        return "" if self.workspace.run is None else render.run_card(self.workspace.run)

    def index(self, data: Mapping[str, Any]) -> str:
        """Begin to index the folder that was typed; the sentence why not, else empty."""
        folder = data.get("folder")
        try:
            if not isinstance(folder, str):
                raise InputError(f"the folder is {folder!r}; it must be text")
            self.workspace.index([folder])
        except ClipkitError as error:
            return render.run(folders=[str(folder)], state="failed", line=str(error))
        return ""


def _card(
    row: PictureRow,
    *,
    rank: int,
    score: float | None = None,
    strength: str | None = None,
    marks: str = "",
) -> render.Card:
    return render.Card(
        rank=rank,
        image_id=row.image_id,
        name=PurePath(row.path).name,
        caption=row.captions[0] if row.captions else "",
        width=row.width,
        height=row.height,
        score=score,
        strength=strength,
        drawn=row.format in ("PNG", "GIF"),
        marks=marks,
    )


def _question(ask: Ask) -> str:
    """What was asked, as safe HTML."""
    if ask.similar:
        source = f"thumbnails/{render.text(ask.similar)}"
        return f'Similar to <img src="{source}" alt="the chosen picture">'
    words = f"“{render.text(ask.words)}”" if ask.words else ""
    if ask.picture:
        sample = f'<img src="queries/{render.text(ask.picture)}" alt="the dropped picture">'
        return f"Like {sample} and {words}" if words else f"Like {sample}"
    return words or "All pictures"


def _key(ask: Ask) -> str:
    """Hex digits that name the question, however many results are shown."""
    parts = (ask.words, ask.picture, ask.similar, ask.folder, ask.after, ask.until)
    return hashlib.blake2b(repr(parts).encode(errors="replace"), digest_size=8).hexdigest()


def build(
    workspace: Workspace, evaluation: Evaluation, *, examples: Sequence[str] = EXAMPLES
) -> gr.Blocks:
    """The page and its events, not yet served. Sets Gradio's environment: it has no other way."""
    os.environ.update(SETTINGS)
    page, evaluations = Page(workspace, examples), EvaluationPage(evaluation)
    form = STATIC["page.html"][0].decode()
    form = form.replace("<!--ADD-->", render.add_form(may_index=workspace.may_index))
    plain: dict[str, Any] = {"apply_default_css": False, "js_on_load": None}
    script = f'<script src="ui/clipkit.js?v={_version("clipkit.js")}"></script>'

    with gr.Blocks(title="clipkit", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML(BRAND, elem_id="brand", **plain)
            status = gr.HTML("", elem_id="status", **plain)
            gr.HTML(TOOLS, elem_id="tools", **plain)
        ask = gr.HTML(form, elem_id="ask", head=script, **{**plain, "js_on_load": ON_LOAD})
        filters = gr.HTML("", elem_id="filters", **plain)
        refusal = gr.HTML("", elem_id="refusal", **plain)
        run = gr.HTML("", elem_id="run", **plain)
        results = gr.HTML("", elem_id="results", **plain)
        timer = gr.Timer(TICK_SECONDS, active=False)

        def look() -> gr.Timer:
            """The timer: it runs while something changes by itself. Ask before the page is drawn: a
            run that ends in between is drawn as ended by one more tick, not as running for good.
            """
            return gr.Timer(active=workspace.indexing or workspace.model.state == "loading")

        def on_load() -> tuple[Any, ...]:
            timer = look()
            return *page.parts(), timer

        def on_ask(event: gr.EventData) -> tuple[str, str]:
            return page.answer(_data(event)), page.parts()[0]

        def on_evaluate(event: gr.EventData) -> tuple[str, str]:
            return evaluations.answer(_data(event)), page.parts()[0]

        def on_index(event: gr.EventData) -> tuple[Any, ...]:
            refused = page.index(_data(event))
            timer, start = look(), page.parts()[3]
            return refused, page.run(), start if EMPTY in start else gr.skip(), timer

        def on_stop() -> str:
            workspace.stop()
            return page.run()

        def on_tick(shown: str) -> tuple[Any, ...]:
            """`shown` is what stands in the results' place: only the empty state changes by itself."""
            timer, (*parts, start) = look(), page.parts()
            return *parts, start if EMPTY in shown else gr.skip(), timer

        everything = [status, filters, run, results, timer]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        blocks.load(on_load, None, everything, **quiet)
        ask.ask(on_ask, None, [results, status], trigger_mode="always_last", **quiet)
        ask.evaluate(on_evaluate, None, [results, status], trigger_mode="always_last", **quiet)
        ask.index(on_index, None, [refusal, run, results, timer], **quiet)
        ask.stop(on_stop, None, [run], **quiet)
        timer.tick(on_tick, [results], everything, **quiet)
    blocks.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
    return blocks


def _data(event: gr.EventData) -> Mapping[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _version(name: str) -> str:
    return hashlib.blake2b(STATIC[name][0], digest_size=6).hexdigest()


def make_app(
    workspace: Workspace, *, host: str = "127.0.0.1", examples: Sequence[str] = EXAMPLES
) -> FastAPI:
    """Page and API as one ASGI app."""
    style = f'<link rel="stylesheet" href="ui/clipkit.css?v={_version("clipkit.css")}">'
    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    evaluation = Evaluation(workspace)
    return gr.mount_gradio_app(
        create_app(workspace, evaluation=evaluation, host=host),
        build(workspace, evaluation, examples=examples),
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
        # Nothing may be uploaded to, or read from the disk by Gradio: trap 28. api.py closes these
        # routes as well.
        max_file_size="1b",
        allowed_paths=[],
        blocked_paths=[os.path.abspath(os.sep)],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


def serve(
    index_folder: Path,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    device: str = "auto",
    precision: str = "auto",
    photos: Sequence[Path] = (),
    examples: Sequence[str] = EXAMPLES,
) -> None:
    """Serve the page until Ctrl-C.

    `model` None is the index's own, else builtin. `photos` are indexed at once, in the background.
    A page that other machines can reach (`host` not this machine's own) searches but does not
    index. Raises InputError if the port cannot be had, IndexDamaged, ModelError.
    """
    import uvicorn

    spec = model or _model_of(index_folder) or "builtin"
    workspace = Workspace(
        index_folder,
        LazyEncoder(spec, device=device, precision=precision),
        may_index=_is_this_machine(host),
    )
    with _listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="clipkit-") as scratch:
        # Gradio's folder for uploads: ours alone, empty, and gone with the server.
        os.environ["GRADIO_TEMP_DIR"] = scratch
        config = uvicorn.Config(
            make_app(workspace, host=host, examples=examples),
            log_level="warning",
            timeout_graceful_shutdown=2,  # open pages hold a connection
            server_header=False,
            ws="none",
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        print(f"clipkit is at {address}  (Ctrl-C ends it)", flush=True)
        if open_browser:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        try:
            workspace.model.warm()
            if photos:
                workspace.index([str(Path(folder).absolute()) for folder in photos])
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            workspace.close()


def _model_of(index_folder: Path) -> str | None:
    """The model that the index was made with last."""
    if not (index_folder / "catalog.sqlite").exists():
        return None
    with Catalog.open(index_folder) as catalog:
        newest = catalog.newest_encoder()
    return newest.spec if newest else None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; InputError for a port in use.

    It listens before the address is printed: a browser that opens at once waits for the server
    instead of being refused.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port"
        ) from error
    return listener
