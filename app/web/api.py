"""The HTTP API, version 1, and the app that serves it with the page's own routes inside the guard.

Bodies and answers are JSON and described at /api/v1/openapi.json. Errors are {"error": one sentence}.
The page searches by the same routes: to a request that accepts text/html, they answer with HTML.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match

from app.corrections import Mark
from app.web import render, schemas
from app.web.guard import Guard, Rules
from app.web.metrics import Metrics
from app.web.models import models_router
from app.web.pictures import QUERY_MEGABYTES, ServerBusy, UnknownPictureError
from app.web.requests import SearchRequest
from app.web.routes import FRESH, page_router, picture_response, read_body
from app.web.saved_reports import SavedReports, UnknownReportError
from app.web.sorting import Sorter, UnknownSortingError
from app.web.workspace import NotAllowedError, PictureGoneError, Side, Workspace, facts
from clipkit import __version__
from clipkit.errors import CatalogBusy, ClipkitError, ImageError, InputError
from clipkit.index_models import OWN_MODELS
from clipkit.search import SearchHit
from clipkit.wording import printable

log = logging.getLogger(__name__)

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
MOST_MARKS = 10_000  # in one answer
SMALL_BYTES = 4_000_000  # a body without pictures
LARGE_BYTES = (
    QUERY_MEGABYTES * 1_400_000
)  # a body with pictures; in base64 they are 4/3 of their size
FAULT = "Unexpected error; see the terminal for details"

_REASONS = {
    400: "The request asks for something that is not possible",
    401: "A token is needed, or it is wrong",
    404: "There is no such picture",
    409: "Another process is writing",
    410: "The picture's file was deleted or has changed",
    413: "The body is too large",
    422: "The request is not as described, or a picture in it cannot be read",
    429: "Too many requests at once from this client; Retry-After says when to come back",
    503: "The server is busy or not ready; Retry-After says when to come back",
}
_BODY = (413, 422)
PathId = Annotated[schemas.ImageId, Path(description="The picture's content hash")]
_JPEG = {200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors that a route may answer with."""
    statuses = (*statuses, 400, 401, 429, 503)
    return {s: {"model": schemas.Error, "description": _REASONS[s]} for s in sorted(statuses)}


class LimitedRoute(APIRoute):
    """Refuse a body that is too large while it arrives: its Content-Length may lie."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        limit = SMALL_BYTES if self.name in ("similar", "embed_text", "add_mark") else LARGE_BYTES

        class Limited(Request):
            async def body(self) -> bytes:
                if not hasattr(self, "_body"):
                    sentence = f"the body is larger than the limit of {limit // 1_000_000} MB"
                    self._body = await read_body(self, limit, sentence)
                return self._body

        async def limited(request: Request) -> Response:
            return await handle(Limited(request.scope, request.receive))

        return limited


def api_router(workspace: Workspace) -> APIRouter:
    """Return the routes of the API over one workspace."""
    router = APIRouter()
    api = APIRouter(prefix="/api/v1", route_class=LimitedRoute)
    searches: dict[str, Any] = {
        "response_model": schemas.SearchResult,
        "responses": _errors(404, *_BODY),
    }

    def answer(request: Request, search: SearchRequest) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(_result(workspace, search), headers=FRESH)
        contents = workspace.contents()
        found = workspace.search(search, contents)
        page = render.results(search, found, workspace.status(contents))
        return HTMLResponse(page, headers={**FRESH, "Vary": "Accept"})

    @api.post("/search", **searches)
    def search(request: Request, body: schemas.SearchBody) -> Response:
        """Search by words, pictures and filters; without any, list the newest pictures."""
        images = tuple(_image(image) for image in body.images)
        return answer(request, _search(body, images=images))

    @api.post("/similar", **searches)
    def similar(request: Request, body: schemas.SimilarBody) -> Response:
        """Find what is like a picture of the library, which is left out itself."""
        return answer(request, _search(body, similar=body.image_id))

    @api.get(
        "/pictures/{image_id}", response_model=schemas.PictureAnswer, responses=_errors(404, 422)
    )
    def picture(image_id: PathId) -> Response:
        """Return what the catalog knows of a picture."""
        details = workspace.details(image_id)
        return JSONResponse({**details, "thumbnail": f"{image_id}/thumbnail"}, headers=FRESH)

    pixels = _errors(404, 410, 422) | _JPEG

    @api.get("/pictures/{image_id}/thumbnail", response_class=Response, responses=pixels)
    def thumbnail(
        image_id: PathId,
        size: Annotated[
            schemas.Size, Query(description="Pixels of the longer side, at most")
        ] = 320,
    ) -> Response:
        """Return a small picture. The address names its content: it may be kept for ever."""
        return picture_response(workspace.thumbnail(image_id, size))

    @api.get("/pictures/{image_id}/file", response_class=Response, responses=pixels)
    def file(image_id: PathId) -> Response:
        """Return the picture, re-encoded for any browser and without metadata."""
        return picture_response(*workspace.picture(image_id))

    def vectors(rows: Any) -> Response:
        model = workspace.model
        answer = {
            "vectors": rows.tolist(),
            "encoder_id": model.encoder_id,
            "space_id": workspace.space_id,
            "dim": rows.shape[1],
        }
        return JSONResponse(answer, headers=FRESH)

    @api.post("/embed/text", response_model=schemas.Vectors, responses=_errors(*_BODY))
    def embed_text(body: schemas.TextsBody) -> Response:
        """Return the unit vectors of texts."""
        return vectors(workspace.embed_texts(body.texts))

    @api.post(
        "/embed/image",
        response_model=schemas.Vectors,
        responses=_errors(*_BODY),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": schemas.ImagesBody.model_json_schema()},
                    "image/*": {"schema": {"type": "string", "format": "binary"}},
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                },
            }
        },
    )
    async def embed_image(request: Request) -> Response:
        """Return the unit vectors of pictures: one file as the body, or several in JSON."""
        data = await request.body()
        pictures = [data]
        if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            try:
                body = schemas.ImagesBody.model_validate_json(data)
            except ValidationError as error:
                errors = error.errors(include_context=False)
                raise RequestValidationError(
                    [{**one, "loc": ("body", *one["loc"])} for one in errors]
                ) from None
            pictures = [_decoded(image) for image in body.images]
        return await run_in_threadpool(lambda: vectors(workspace.embed_pictures(pictures)))

    @api.post("/similarity", response_model=schemas.Similarity, responses=_errors(404, *_BODY))
    def similarity(body: schemas.SimilarityBody) -> Response:
        """Return the cosine of two pictures, two texts, or a picture and a text."""
        cosine = workspace.similarity(_side(body.a), _side(body.b))
        answer = {"cosine": cosine, "encoder_id": workspace.model.encoder_id}
        return JSONResponse(answer, headers=FRESH)

    @api.get("/marks", response_model=schemas.Marks, responses=_errors(422))
    def marks(
        limit: Annotated[int, Query(ge=1, le=MOST_MARKS)] = 1_000,
        cursor: Annotated[int, Query(ge=0, description="`cursor` of the answer before")] = 0,
    ) -> Response:
        """List the results that were marked right or wrong, the oldest mark first."""
        all_marks = workspace.corrections.all()
        end = cursor + limit
        answer = {
            "marks": [asdict(mark) for mark in all_marks[cursor:end]],
            "total": len(all_marks),
            "cursor": end if end < len(all_marks) else None,
        }
        return JSONResponse(answer, headers=FRESH)

    @api.post("/marks", response_model=schemas.MarkAnswer, responses=_errors(404, 409, *_BODY))
    def add_mark(body: schemas.MarkBody) -> Response:
        """Mark a result of a query by words as right or wrong; null takes the mark back."""
        mark = Mark.of_query(body.image_id, body.query, body.right)
        total = workspace.mark(mark)
        answer = {
            "image_id": mark.picture,
            "query": mark.query,
            "right": mark.right,
            "total": total,
        }
        return JSONResponse(answer, headers=FRESH)

    @api.get("/status", response_model=schemas.StatusAnswer, responses=_errors())
    def status() -> Response:
        """Say which model and which index answer."""
        now = workspace.status()
        answer = {
            "version": __version__,
            "model": printable(now.spec),
            "encoder_id": now.encoder_id,
            "space_id": workspace.space_id,
            "state": now.model,
            "pictures": now.pictures,
            "newest": now.newest,
            "indexing": now.indexing,
            "marks": now.corrections,
        }
        return JSONResponse(answer, headers=FRESH)

    @cache
    def described() -> dict[str, Any]:
        description = get_openapi(
            title="clipkit",
            version=__version__,
            summary="Search pictures by words and by pictures",
            description=(
                'Errors are {"error": one sentence}. Where the server asks for a token, send it as '
                "`Authorization: Bearer TOKEN`."
            ),
            routes=router.routes,
        )
        schemes = {"token": {"type": "http", "scheme": "bearer"}}
        description.setdefault("components", {})["securitySchemes"] = schemes
        return {**description, "security": [{"token": []}, {}]}  # {}: where no token is asked for

    @api.get("/openapi.json", include_in_schema=False)
    def openapi(request: Request) -> Response:
        prefix = request.scope.get("root_path")
        return JSONResponse({**described(), **({"servers": [{"url": prefix}]} if prefix else {})})

    @api.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return HTMLResponse(render.part("docs", api=described()))

    @router.get("/healthz", response_model=schemas.Health)
    async def healthz() -> Response:
        """Say that the process is alive; does no work."""
        return JSONResponse({"status": "ok"}, headers=FRESH)

    @router.get("/readyz", response_model=schemas.Health, responses={503: _errors()[503]})
    def readyz() -> Response:
        """Say that a search would not wait for the model or the index, and that they go together."""
        workspace.check_ready()
        return JSONResponse({"status": "ok"}, headers=FRESH)

    router.include_router(api)

    @router.api_route("/api/v1/{rest:path}", methods=[*METHODS], include_in_schema=False)
    def unknown(request: Request) -> Response:
        path = request.scope["path"]
        methods = [
            method
            for method in METHODS
            for route in api.routes[:]
            if route.matches({**request.scope, "method": method})[0] is Match.FULL
        ]
        if not methods:
            raise StarletteHTTPException(
                404, f"there is no {path}; /api/v1/docs describes what there is"
            )
        allowed = ", ".join(methods)
        raise StarletteHTTPException(
            405, f"{request.method} {path} is not possible; use {allowed}", {"Allow": allowed}
        )

    return router


# ---- from bodies


def _search(body: schemas.SearchBody | schemas.SimilarBody, **subject: Any) -> SearchRequest:
    filters = body.filters
    after, until = _date(filters.after), _date(filters.until)
    if after and until and after > until:
        raise InputError(f"the dates run from {after} to {until}; the first must not be later")
    return SearchRequest(
        words=body.query.strip(),
        folder=filters.folder or None,
        after=after,
        until=until,
        orientation=filters.orientation,
        format=filters.format or None,
        camera=filters.camera or None,
        size=filters.size or 0,
        sort=body.sort,
        limit=body.limit,
        cursor=body.cursor,
        **subject,
    )


def _date(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise InputError(f"{text!r} is not a date; use the form 2023-05-31") from None


def _image(text: str) -> str | bytes:
    """Return an image_id as it is, and a picture in base64 as the file's bytes."""
    if re.fullmatch("[0-9a-f]{32}", text):
        return text
    return _decoded(text, "neither an image_id of 32 hex digits nor a picture file in base64")


def _decoded(text: str, fault: str = "not a picture file in base64") -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{text[:40]!r} is {fault}") from None


def _side(body: schemas.SideBody) -> Side:
    if body.image is not None:
        return Side("image", _decoded(body.image))
    return (
        Side("text", body.text) if body.text is not None else Side("image_id", str(body.image_id))
    )


# ---- to answers


def _result(workspace: Workspace, search: SearchRequest) -> dict[str, Any]:
    found = workspace.search(search)
    empty = found.empty and {
        "sentence": printable(found.empty.sentence),
        "offers": [
            {**asdict(o), "label": printable(o.label), "query": printable(o.query)}
            for o in found.empty.offers
        ],
    }
    return {
        "hits": [_hit(hit) for hit in found.hits],
        "total": found.total,
        "cursor": found.cursor,
        "notes": [printable(note) for note in found.notes],
        "empty": empty,
        "seconds": found.seconds,
    }


def _hit(hit: SearchHit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": hit.score,
        "strength": hit.strength,
        "probability": hit.probability,
        **facts(hit.picture),
        "thumbnail": f"pictures/{hit.picture.image_id}/thumbnail",
    }


# ---- the app


def create_app(
    workspace: Workspace,
    *,
    sorter: Sorter | None = None,
    reports: SavedReports | None = None,
    rules: Rules | None = None,
    examples: Sequence[str] = (),
) -> FastAPI:
    """Return the app with the API and the page's routes inside the guard; `rules` say who may ask.

    `examples` are searches that the start page offers.
    """
    app = FastAPI(title="clipkit", docs_url=None, redoc_url=None, openapi_url=None)
    sorter = sorter or Sorter(workspace)
    reports = reports or SavedReports(taught=workspace.folder / OWN_MODELS)
    rules = rules or Rules(names=Rules.names_of("localhost"))
    metrics = Metrics(workspace, rules.load)
    workspace.observers.append(metrics.searched)
    app.include_router(metrics.router)
    rules = replace(rules, observers=(*rules.observers, metrics.answered))
    app.add_middleware(Guard, rules=rules)
    app.include_router(api_router(workspace))
    app.include_router(page_router(workspace, sorter=sorter, reports=reports, examples=examples))

    app.include_router(models_router(workspace, reports))

    @app.exception_handler(ClipkitError)
    def refused(request: Request, error: ClipkitError) -> JSONResponse:  # noqa: ARG001
        headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else {}
        return JSONResponse({"error": printable(str(error))}, _status(error), headers)

    @app.exception_handler(StarletteHTTPException)
    def missing(request: Request, error: StarletteHTTPException) -> JSONResponse:  # noqa: ARG001
        return JSONResponse(
            {"error": printable(str(error.detail))}, error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:  # noqa: ARG001
        first = error.errors()[0]
        if first["loc"][0] == "path":
            sentence = "malformed picture id; it must be a content hash of 32 hex digits"
            return JSONResponse({"error": sentence}, 404)
        return JSONResponse({"error": printable(_sentence(first))}, 422)

    @app.exception_handler(Exception)  # the caller reads a sentence, the terminal has the traceback
    def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed", request.url.path, exc_info=error)
        return JSONResponse({"error": FAULT}, 500)

    return app


_KINDS = {
    "string_type": "a string",
    "string_pattern_mismatch": "a picture's image_id, which has 32 hex digits",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a JSON object",
    "model_attributes_type": "a JSON object",
}


def _sentence(error: Mapping[str, Any]) -> str:
    """Say what is wrong with a field, from pydantic's description, in the words of JSON."""
    name = ".".join(str(part) for part in error["loc"][1:])
    message = str(error["msg"])
    if error["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name or 'the body'} is missing"
    if error["type"].startswith("json"):
        return f"the body is not JSON: {error.get('ctx', {}).get('error', message)}"
    given = error.get("input")
    if isinstance(given, bytes):
        return "the body is not marked as JSON; send it with Content-Type: application/json"
    value = json.dumps(given) if given is None or isinstance(given, bool) else repr(given)
    kind = _KINDS.get(error["type"])
    rule = (
        f"it must be {kind}"
        if kind
        else re.sub("^(Input|String|List) should ", "it must ", message)
    )
    return f"{name or 'the body'} is {value:.80}; {rule}"


def _status(error: ClipkitError) -> int:
    if isinstance(error, NotAllowedError):
        return 403
    if isinstance(error, ServerBusy):
        return 503
    if isinstance(error, PictureGoneError):
        return 410
    if isinstance(error, UnknownPictureError | UnknownReportError | UnknownSortingError):
        return 404
    if isinstance(error, ImageError):
        return 422
    if isinstance(error, CatalogBusy):
        return 409
    return 400 if isinstance(error, InputError) else 500
