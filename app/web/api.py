"""The HTTP routes of the app, inside the guard of guard.py.

    GET  /health             model, index and version
    GET  /thumbnails/{id}    a small picture; id is the picture's content hash, 32 hex digits
    GET  /pictures/{id}      the picture, re-encoded for any browser and without metadata
    GET  /details/{id}       what the catalog knows of it, as JSON
    POST /open/{id}          open its file on this machine's screen, for its own page only
    POST /show/{id}          the same for the folder around it
    POST /results            a search from `offset` on, as the page's HTML
    POST /queries            a picture to search with, as the request's body -> {"id": ...}
    GET  /queries/{id}       that picture, small
    GET  /ui/{name}          the page's own style, script and mark
    GET  /reports/{name}     a saved report's page, by its folder's name; run@NAME: a training run's
    GET  /sortings/{key}.csv the pictures as they were sorted into words
    POST /corrections        {"picture": id, "query": words, "right": true, false or null to unmark}
    GET  /corrections.jsonl  all marks of results, for `clipkit data build`
    GET  /metrics            what Prometheus scrapes (app.web.metrics)
    GET  /folders            the indexed folders, as HTML for the folders panel
    POST /folders/browse     a folder's key as the request's body -> the folders inside it, as HTML
    POST /folders/forget     the same -> the indexed folders without it, as HTML

No path from a request reaches the file system but that of /folders/browse, which app.web.folders
checks. Errors are JSON: {"error": one sentence}. The page itself is Gradio's, mounted by page.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from app.corrections import MARK_BYTES, Mark
from app.web import render
from app.web.guard import FOREVER, Guard, Rules
from app.web.metrics import Metrics
from app.web.requests import QUERY_MEGABYTES, REQUEST_BYTES, SearchRequest, UnknownPictureError
from app.web.saved_reports import SavedReports, UnknownReportError
from app.web.sorting import Sorter, UnknownSortingError
from app.web.workspace import NotAllowedError, PictureGoneError, Workspace
from clipkit import __version__
from clipkit.errors import CatalogBusy, ClipkitError, ImageError, InputError

ImageId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
KEY_BYTES = 20_000  # a request about a folder
STATIC = {
    name: (resources.files("app.web").joinpath("static", name).read_bytes(), mime)
    for name, mime in (
        ("clipkit.css", "text/css; charset=utf-8"),
        ("clipkit.js", "text/javascript; charset=utf-8"),
        ("panel.js", "text/javascript; charset=utf-8"),
        ("viewer.js", "text/javascript; charset=utf-8"),
        ("clipkit.svg", "image/svg+xml"),
    )
}

_FRESH = {"Cache-Control": "no-store"}


def create_app(
    workspace: Workspace,
    *,
    sorter: Sorter | None = None,
    reports: SavedReports | None = None,
    rules: Rules | None = None,
) -> FastAPI:
    """Return the app with the routes above, inside the guard; `rules` say who may ask."""
    app = FastAPI(title="clipkit", docs_url=None, redoc_url=None, openapi_url=None)
    sorter, reports = sorter or Sorter(workspace), reports or SavedReports()
    rules = rules or Rules(names=Rules.names_of("localhost"))
    metrics = Metrics(workspace, rules.load)
    workspace.observers.append(metrics.searched)
    app.include_router(metrics.router)
    rules = replace(rules, observers=(*rules.observers, metrics.answered))
    app.add_middleware(Guard, rules=rules)

    @app.exception_handler(ClipkitError)
    def refused(request: Request, error: ClipkitError) -> JSONResponse:  # noqa: ARG001
        return JSONResponse({"error": str(error)}, _status(error))

    @app.exception_handler(StarletteHTTPException)
    def missing(request: Request, error: StarletteHTTPException) -> JSONResponse:  # noqa: ARG001
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:  # noqa: ARG001
        sentence = "malformed picture id; it must be a content hash of 32 hex digits"
        return JSONResponse({"error": sentence}, 404)

    @app.get("/health")
    def health() -> dict[str, object]:
        status = workspace.status()
        return {
            "name": "clipkit",
            "version": __version__,
            "model": status.spec,
            "encoder_id": status.encoder_id,
            "pictures": status.pictures,
            "indexing": status.indexing,
        }

    @app.get("/thumbnails/{image_id}")
    def thumbnail(image_id: ImageId) -> Response:
        return _picture(workspace.thumbnail(image_id))

    @app.get("/pictures/{image_id}")
    def picture(image_id: ImageId) -> Response:
        return _picture(*workspace.picture(image_id))

    @app.get("/details/{image_id}")
    def details(image_id: ImageId) -> JSONResponse:
        return JSONResponse(workspace.details(image_id), headers=_FRESH)

    @app.post("/open/{image_id}", status_code=204)
    def open_file(image_id: ImageId) -> None:
        workspace.show_file(image_id)

    @app.post("/show/{image_id}", status_code=204)
    def show_in_folder(image_id: ImageId) -> None:
        workspace.show_file(image_id, folder=True)

    @app.post("/results")
    async def results(request: Request) -> HTMLResponse:
        too_large = f"the search is larger than the limit of {REQUEST_BYTES // 1000} kB; shorten it"
        body = await _body(request, REQUEST_BYTES, too_large)
        search = SearchRequest.from_json(body)
        return HTMLResponse(await run_in_threadpool(found, search), headers=_FRESH)

    def found(search: SearchRequest) -> str:
        answer, status = workspace.search(search), workspace.status()
        return render.results(search, answer, ticket="", total_corrections=status.corrections)

    @app.post("/queries")
    async def ask_with(request: Request) -> dict[str, str]:
        too_large = f"the picture is larger than the limit of {QUERY_MEGABYTES} MB; resize it"
        data = await _body(request, QUERY_MEGABYTES * 1_000_000, too_large)
        return {"id": await run_in_threadpool(workspace.dropped.add, data)}

    @app.get("/queries/{image_id}")
    def query_picture(image_id: ImageId) -> Response:
        return _picture(workspace.dropped.sample(image_id))

    @app.get("/ui/{name}")
    def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404, f"no file {name!r}")
        data, mime = STATIC[name]
        return Response(data, media_type=mime, headers={"Cache-Control": "no-cache"})

    @app.get("/reports/{name}")
    def report(name: str) -> Response:
        return Response(reports.page(name), media_type="text/html", headers=_FRESH)

    @app.get("/sortings/{key}.csv")
    def sorting(key: str) -> Response:
        return _download(sorter.table(key), "text/csv", "clipkit-sorted.csv")

    @app.post("/corrections")
    async def add_mark(request: Request) -> dict[str, object]:
        limit = MARK_BYTES // 1000
        too_large = f"the mark is larger than the limit of {limit} kB; shorten the query"
        mark = Mark.from_json(await _body(request, MARK_BYTES, too_large))
        total = await run_in_threadpool(workspace.mark, mark)
        return {**asdict(mark), "corrections": total}

    @app.get("/corrections.jsonl")
    def corrections() -> Response:
        lines = (json.dumps(row) + "\n" for row in workspace.exported())
        return _download(lines, "application/x-ndjson", "clipkit-corrections.jsonl")

    @app.get("/folders")
    def roots() -> Response:
        return _fragment("folders", roots=workspace.roots(), may_index=workspace.may_index)

    @app.post("/folders/browse")
    async def browse(request: Request) -> Response:
        listing = await run_in_threadpool(workspace.browse, await _key(request))
        return _fragment("listing", listing=listing)

    @app.post("/folders/forget")
    async def forget(request: Request) -> Response:
        await run_in_threadpool(workspace.forget, await _key(request))
        return await run_in_threadpool(roots)

    @app.get("/favicon.ico")
    def icon() -> Response:
        return static("clipkit.svg")

    return app


async def _body(request: Request, limit: int, too_large: str) -> bytes:
    """Return the request's body of up to `limit` bytes, counted on arrival: a Content-Length may lie."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise HTTPException(413, too_large)
    return bytes(data)


async def _key(request: Request) -> str:
    """Return the folder's key that is the request's body."""
    body = await _body(request, KEY_BYTES, "the path of the folder is too long")
    return body.decode("ascii", "replace")


def _fragment(name: str, **values: object) -> Response:
    return Response(render.part(name, **values), media_type="text/html", headers=_FRESH)


def _picture(data: bytes, mime: str = "image/jpeg") -> Response:
    return Response(data, media_type=mime, headers={"Cache-Control": FOREVER})


def _download(pieces: Iterable[str | bytes], mime: str, name: str) -> Response:
    headers = {**_FRESH, "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(pieces, media_type=mime, headers=headers)


def _status(error: ClipkitError) -> int:
    if isinstance(error, NotAllowedError):
        return 403
    if isinstance(error, PictureGoneError):
        return 410
    if isinstance(error, UnknownPictureError | UnknownReportError | UnknownSortingError):
        return 404
    if isinstance(error, ImageError):
        return 422
    if isinstance(error, CatalogBusy):
        return 409
    return 400 if isinstance(error, InputError) else 500
