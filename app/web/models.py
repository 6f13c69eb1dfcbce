"""The panel of models: which ones the index has, what they brought, and switching between them.

    GET  /models          the models of the index, as HTML for the panel
    GET  /models/active   {"encoder_id": ..., "indexing": ..., "pictures": ...}: which model answers,
                          whether folders are being indexed, and how many pictures there are, by
                          which a page sees what others do, and what an event that was lost changed
    POST /models/use      an encoder_id as the request's body: this model answers from now on
    POST /models/fill     an encoder_id, or a spec of `clipkit models`: encode all pictures with it
    POST /models/drop     an encoder_id: remove this model's vectors
    POST /teach/WHAT      start, cancel, use, keep, undo or dismiss: see app.web.teaching

These answer with the panel's HTML. A model is named by what the server has listed itself: no path
from a request reaches the file system.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool

from app.web import render
from app.web.saved_reports import SavedReports
from app.web.workspace import Workspace
from clipkit.checkpoint import RUN_RESULT
from clipkit.errors import InputError
from clipkit.index_models import IndexModel
from clipkit.models import RUNS, list_models

NAME_BYTES = 4_000  # the name of a model as it is sent
_FRESH = {"Cache-Control": "no-store"}
OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "mixed": "better and worse",
    "same": "no difference",
}


@dataclass(frozen=True, slots=True)
class Gain:
    """What a training run's report says of its model: text to image R@1 on held-out pictures."""

    before: float
    after: float
    outcome: str  # a value of OUTCOMES
    pictures: int  # held out
    start: str  # spec of the model that it was trained from


def gain_of(spec: str) -> Gain | None:
    """Return what the report of the training run at `spec` says; None if there is none."""
    path = Path(spec)
    if not path.is_absolute():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        verdict = json.loads((path / "verdict.json").read_bytes())
        outcome = OUTCOMES[verdict["outcome"]]
        figures = float(verdict["before"]), float(verdict["after"])
        return Gain(*figures, outcome, int(verdict["pictures"]), str(verdict["start"]))
    return None


def known_specs() -> tuple[str, ...]:
    """Return the specs that may be chosen to fill the index with, beside its own models."""
    return _specs(tuple(sorted(map(str, RUNS.glob(f"*/{RUN_RESULT}")))))


@lru_cache(maxsize=1)
def _specs(_runs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row.spec for row in list_models() if not row.spec.endswith(":FILE"))


def models_router(workspace: Workspace, reports: SavedReports) -> APIRouter:
    """Return the routes above; the panel links to those of `reports` that are of a listed model."""
    router = APIRouter()

    def panel() -> Response:
        models, lesson = workspace.models(), workspace.teacher.lesson
        html = render.part(
            "models",
            models=models,
            gains={model.encoder_id: gain_of(model.spec) for model in models},
            reports={model.encoder_id: reports.name_of(model.spec) for model in models},
            run=workspace.run,
            indexing=workspace.indexing,
            lesson=lesson,
            report=reports.name_of(lesson.spec) if lesson is not None else "",
            material=workspace.teacher.material() if models else None,
            may_index=workspace.may_index,
            specs=known_specs() if workspace.may_index else (),
        )
        return Response(html, media_type="text/html", headers=_FRESH)

    @router.get("/models")
    def listed() -> Response:
        return panel()

    @router.get("/models/active")
    def active() -> dict[str, Any]:
        pictures = workspace.contents().pictures  # follows a switch
        return {
            "encoder_id": workspace.model.known_id,
            "indexing": workspace.indexing,
            "pictures": pictures,
        }

    @router.post("/models/use")
    async def use(request: Request) -> Response:
        return await _changed(request, lambda name: workspace.use_model(_listed(workspace, name)))

    @router.post("/models/fill")
    async def fill(request: Request) -> Response:
        return await _changed(request, lambda name: workspace.fill(_fillable(workspace, name)))

    @router.post("/models/drop")
    async def drop(request: Request) -> Response:
        return await _changed(request, lambda name: workspace.drop_model(_listed(workspace, name)))

    @router.post("/teach/{what}")
    def teach(what: Literal["start", "cancel", "use", "keep", "undo", "dismiss"]) -> Response:
        workspace.teach(what)
        return panel()

    async def _changed(request: Request, change: Callable[[str], object]) -> Response:
        name = await _name(request)

        def work() -> Response:
            change(name)
            return panel()

        return await run_in_threadpool(work)

    return router


def _listed(workspace: Workspace, name: str) -> str:
    """Return the encoder_id of a model of the index. Raises InputError for any other name."""
    return _model(workspace, name).encoder_id


def _model(workspace: Workspace, name: str) -> IndexModel:
    for model in workspace.models():
        if model.encoder_id == name:
            return model
    raise InputError("this model is not in the index any more; open the panel again")


def _fillable(workspace: Workspace, name: str) -> str:
    """Return the spec of a model of the index or of `known_specs`. Raises InputError for another."""
    if name in known_specs():
        return name
    with suppress(InputError):
        return _model(workspace, name).spec
    raise InputError(
        f"model {name[:80]!r} is not listed; choose one of the list, or fill the index with any other "
        "on the command line: clipkit index FOLDER --model MODEL"
    )


async def _name(request: Request) -> str:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > NAME_BYTES:
            raise HTTPException(413, f"the name is longer than the limit of {NAME_BYTES:,} bytes")
    return bytes(data).decode("utf-8", "replace").strip()
