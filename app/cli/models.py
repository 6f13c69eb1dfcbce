"""`clipkit models`: which models there are, how large they are, and which are on this disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.terminal import JsonOption, examples, size
from clipkit.wording import count, printable

if TYPE_CHECKING:
    from clipkit.models import ModelRow

EPILOG = examples(
    "clipkit models b-32",
    "clipkit models siglip 384",
    "clipkit models --here",
    "clipkit index ~/Pictures --model ViT-B-32/laion2b_s34b_b79k",
    "clipkit eval zeroshot --data cifar10 --model ViT-S-32-alt:epoch_1.pt",
)


def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILTER]...", show_default=False, help="What a model's name must contain."
        ),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Only models that are on this disk.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the models that --model takes: the built-in one, your runs, and OpenCLIP's.

    A pretrained model is fetched from the Hugging Face hub when it is first
    used, and stays on this disk. Any architecture also takes weights of your
    own, as in ViT-B-32:epoch_1.pt; they are converted once, to safetensors,
    and no code that such a file may hold is run.
    """
    from clipkit.models import list_models

    rows = [row for row in list_models(words or ()) if row.bytes is not None or not here]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    width = max((len(printable(row.spec)) for row in rows), default=0)
    if rows:
        print(f"{'model':<{width}}  {'dim':>4}  {'pixels':>7}  {'parameters':>10}  on this disk")
    for row in rows:
        print(f"{printable(row.spec):<{width}}  {_facts(row)}".rstrip())
    on_disk = sum(row.bytes is not None for row in rows)
    print(f"{count(len(rows), 'model')}, {on_disk:,} on this disk")


def _facts(row: ModelRow) -> str:
    height, wide = row.image_size
    pixels = str(height) if height == wide else f"{height}x{wide}"
    parameters = "" if row.parameters is None else f"{row.parameters / 1e6:,.0f} M"
    on_disk = "" if row.bytes is None else size(row.bytes)
    return f"{row.dim:>4}  {pixels:>7}  {parameters:>10}  {on_disk}"
