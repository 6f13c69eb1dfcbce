"""Schemathesis: requests made from the OpenAPI description, right and wrong ones. No answer may be a
server's fault, and every one must be as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from colours import ColourModel, paint
from hypothesis import given, settings
from schemathesis import GenerationMode

from app.web.api import create_app
from app.web.guard import Rules
from app.web.requests import SearchRequest
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders

CHECKS = [
    getattr(schemathesis.checks, name)
    for name in (
        "not_a_server_error",
        "content_type_conformance",
        "negative_data_rejection",
        "response_schema_conformance",
        "status_code_conformance",
        "unsupported_method",
    )
]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, model = tmp_path_factory.mktemp("library"), ColourModel()
    for number, colour in enumerate(("red", "blue", "green")):
        paint(folder / "photos" / f"{colour}.png", colour, number=number)
    with Catalog.open(folder / "index", write=True) as catalog:
        index_folders(catalog, [folder / "photos"], encoder=model)
    workspace = Workspace(folder / "index", model)  # type: ignore[arg-type]
    workspace.search(SearchRequest(words="red"))  # /readyz is not ready before
    names = Rules.names_of("testserver")  # the name that Schemathesis asks
    yield create_app(workspace, rules=Rules(names=names))
    workspace.close()


def attack(app: Any, examples: int) -> None:
    """Send `examples` requests as described, and as many that are not, to every operation."""
    described = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) == 13
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode == GenerationMode.NEGATIVE and not (operation.body or operation.query):
                continue  # nothing to be wrong in

            @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                case.call_and_validate(checks=CHECKS)

            send()


def test_every_answer_is_as_described(app: Any) -> None:
    attack(app, 10)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_every_answer_is_as_described_for_many_requests(app: Any) -> None:
    attack(app, 500)
