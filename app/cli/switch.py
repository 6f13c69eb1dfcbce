"""`clipkit use` and `clipkit drop`: which of an index's models answers, and which ones it keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from app.cli.terminal import Commands, IndexOption, JsonOption, YesOption, examples, size
from app.paths import index_folder
from clipkit.wording import count, printable


def _models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return what the shell completes: the specs of the index's models, else the ids it has begun."""
    from clipkit.catalog import Catalog
    from clipkit.errors import ClipkitError

    try:
        with Catalog.open(index_folder(ctx.params.get("index"))) as catalog:
            rows = catalog.encoders()
    except ClipkitError:
        return []
    specs = [row.spec for row in rows if row.spec.startswith(incomplete)]
    return specs or [row.encoder_id for row in rows if row.encoder_id.startswith(incomplete)]


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        autocompletion=_models,
        help="Its spec or path, or the beginning of its id, as clipkit status lists them.",
    ),
]


def use(model: ModelArgument, index: IndexOption = None, as_json: JsonOption = False) -> None:
    """Make a model of the index the one that answers searches.

    It must have a vector of every picture; `clipkit index FOLDER --model MODEL` encodes what is
    missing while the present model answers. A model with the same picture side as one that is there
    needs no vectors of its own. Open pages follow with their next search.

    --json prints one object: the model's spec, encoder_id and vectors, and before, the spec of the
    model that answered until now.
    """
    from clipkit import Library

    with Library.open(index_folder(index)) as library:
        before = next((one for one in library.models() if one.active), None)
        now = library.use(model)
    if as_json:
        rest = {"before": before.spec if before else None}
        print(json.dumps({**_facts(now), **rest}, indent=2))
    elif before is not None and before.encoder_id == now.encoder_id:
        print(f"searches use {printable(now.spec)} already")
    else:
        former = f" instead of {printable(before.spec)}" if before else ""
        print(f"searches now use {printable(now.spec)}{former}")


def drop(
    model: ModelArgument,
    index: IndexOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a model and its vectors from the index; the one that answers searches stays.

    The pictures and the model's own files are not touched, except those of a model that was taught
    on the page, which lie in the index's folder. To have the vectors again, all pictures must be
    encoded again. --json prints one object: the model's spec, encoder_id and vectors, and removed,
    how many vectors went: those that another model shares stay.
    """
    from clipkit import Library
    from clipkit.index_models import find_model

    with Library.open(index_folder(index)) as library:
        named = find_model(library.models(), model, index=library.folder)
        if not (yes or named.active):
            what = f"{count(named.vectors, 'vector')} of {printable(named.spec)}"
            typer.confirm(f"Remove {what} from the index?", abort=True, err=True)
        removed = library.drop(named.encoder_id)
    if as_json:
        print(json.dumps({**_facts(named), "removed": removed}, indent=2))
        return
    print(f"{printable(named.spec)} removed from the index, with {count(removed, 'vector')}")
    if named.shared_with and not removed:
        print(f"its vectors stay: they are also those of {printable(named.shared_with[0])}")


def _facts(model: Any) -> dict[str, Any]:
    return {"spec": model.spec, "encoder_id": model.encoder_id, "vectors": model.vectors}


def rows_of_status(catalog: Any) -> list[dict[str, Any]]:
    """Return the models of an index as `clipkit status --json` prints them."""
    from clipkit.index_models import models_of

    return [
        {
            "spec": model.spec,
            "encoder_id": model.encoder_id,
            "space_id": model.space_id,
            "vectors": model.vectors,
            "missing": model.missing,
            "bytes": model.bytes,
            "shared_with": list(model.shared_with),
            "answers": model.active,
            "gone": model.gone,
        }
        for model in models_of(catalog)
    ]


def lines_of_status(rows: list[dict[str, Any]], pictures: int) -> Iterator[str]:
    """Yield a line for each model, as `clipkit status` prints them."""
    for row in rows:
        of = f" of {pictures:,}" if row["missing"] else ""
        notes = [f"{row['vectors']:,}{of} vectors", size(row["bytes"])]
        if row["shared_with"]:
            notes.append(f"shared with {printable(row['shared_with'][0])}")
        if row["answers"] and len(rows) > 1:
            notes.append("answers searches")
        if row["gone"]:
            notes.append("is not there any more")
        yield f"model      {printable(row['spec'])} ({row['encoder_id']}), {', '.join(notes)}"
    if len(rows) > 1:
        yield "           change it with: clipkit use MODEL"


def add_commands(cli: Commands) -> None:
    """Register the commands above, each with its examples."""
    cli.command(
        epilog=examples(
            "clipkit use runs/mine",
            "clipkit use builtin",
            "clipkit use 09a2 --index /fast/disk/index",
        )
    )(use)
    cli.command(
        epilog=examples("clipkit drop ViT-B-32/laion2b_s34b_b79k", "clipkit drop 51ad --yes")
    )(drop)
