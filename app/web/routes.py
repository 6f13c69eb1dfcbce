"""The page's own routes: what its scripts ask for beside the searches of api.py.

    GET  /health             model, index and version
    GET  /start              what the page shows before the first search, as HTML
    GET  /thumbnails/{id}    a small picture; id is the picture's content hash, 32 hex digits
    GET  /pictures/{id}      the picture, re-encoded for any browser and without metadata
    GET  /details/{id}       what the catalog knows of it, as JSON
    POST /open/{id}          open its file on this machine's screen, for its own page only
    POST /show/{id}          the same for the folder around it
    POST /queries            a picture to search with, as the request's body -> {"id": ...}
    GET  /queries/{id}       that picture, small
    GET  /ui/{name}          the page's own style, script and mark
    GET  /reports/{name}     a saved report's page, by its folder's name; run@NAME: a training run's,
                             taught@NAME: that of a model that was taught on the page
    GET  /sortings/{key}.csv the pictures as they were sorted into words
    GET  /corrections.jsonl  all marks of results, for `clipkit data build`
    GET  /folders            the indexed folders, as HTML for the folders panel
    POST /folders/browse     a folder's key as the request's body -> the folders inside it, as HTML
    POST /folders/forget     the same -> the indexed folders without it, as HTML

No path from a request reaches the file system but that of /folders/browse, which app.web.folders
checks. The page itself is Gradio's, mounted by page.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.web import render
from app.web.guard import FOREVER
from app.web.pictures import QUERY_MEGABYTES
from app.web.saved_reports import SavedReports
from app.web.sorting import Sorter
from app.web.workspace import Workspace
from clipkit import __version__

ImageId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
KEY_BYTES = 20_000  # a request about a folder
STATIC = {
    name: (resources.files("app.web").joinpath("static", name).read_bytes(), mime)
    for name, mime in (
        ("clipkit.css", "text/css; charset=utf-8"),
        ("clipkit.js", "text/javascript; charset=utf-8"),
        ("models.js", "text/javascript; charset=utf-8"),
        ("panel.js", "text/javascript; charset=utf-8"),
        ("viewer.js", "text/javascript; charset=utf-8"),
        ("clipkit.svg", "image/svg+xml"),
    )
}

FRESH = {"Cache-Control": "no-store"}


def page_router(
    workspace: Workspace, *, sorter: Sorter, reports: SavedReports, examples: Sequence[str]
) -> APIRouter:
    """Return the routes above; `examples` are searches that the start page offers."""
    app = APIRouter()

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
        return picture_response(workspace.thumbnail(image_id))

    @app.get("/pictures/{image_id}")
    def picture(image_id: ImageId) -> Response:
        return picture_response(*workspace.picture(image_id))

    @app.get("/details/{image_id}")
    def details(image_id: ImageId) -> JSONResponse:
        return JSONResponse(workspace.details(image_id), headers=FRESH)

    @app.post("/open/{image_id}", status_code=204)
    def open_file(image_id: ImageId) -> None:
        workspace.show_file(image_id)

    @app.post("/show/{image_id}", status_code=204)
    def show_in_folder(image_id: ImageId) -> None:
        workspace.show_file(image_id, folder=True)

    @app.get("/start")
    def start() -> Response:
        contents = workspace.contents()
        status = workspace.status(contents)
        if not status.pictures:
            may_index = workspace.may_index
            return _fragment("empty", stage=status.stage, may_index=may_index)
        return _fragment("home", status=status, examples=examples, newest=contents.newest)

    @app.post("/queries")
    async def ask_with(request: Request) -> dict[str, str]:
        too_large = f"the picture is larger than the limit of {QUERY_MEGABYTES} MB; resize it"
        data = await read_body(request, QUERY_MEGABYTES * 1_000_000, too_large)
        return {"id": await run_in_threadpool(workspace.dropped.add, data)}

    @app.get("/queries/{image_id}")
    def query_picture(image_id: ImageId) -> Response:
        return picture_response(workspace.dropped.sample(image_id))

    @app.get("/ui/{name}")
    def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404, f"no file {name!r}")
        data, mime = STATIC[name]
        return Response(data, media_type=mime, headers={"Cache-Control": "no-cache"})

    @app.get("/reports/{name}")
    def report(name: str) -> Response:
        return Response(reports.page(name), media_type="text/html", headers=FRESH)

    @app.get("/sortings/{key}.csv")
    def sorting(key: str) -> Response:
        return _download(sorter.table(key), "text/csv", "clipkit-sorted.csv")

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


async def read_body(request: Request, limit: int, too_large: str) -> bytes:
    """Return the request's body of up to `limit` bytes, counted on arrival: a Content-Length may lie."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise HTTPException(413, too_large)
    return bytes(data)


async def _key(request: Request) -> str:
    """Return the folder's key that is the request's body."""
    body = await read_body(request, KEY_BYTES, "the path of the folder is too long")
    return body.decode("ascii", "replace")


def _fragment(name: str, **values: object) -> Response:
    return Response(render.part(name, **values), media_type="text/html", headers=FRESH)


def picture_response(data: bytes, mime: str = "image/jpeg") -> Response:
    return Response(data, media_type=mime, headers={"Cache-Control": FOREVER})


def _download(pieces: Iterable[str | bytes], mime: str, name: str) -> Response:
    headers = {**FRESH, "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(pieces, media_type=mime, headers=headers)
