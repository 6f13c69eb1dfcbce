"""`clipkit cache`: show or empty the feature cache of the evaluations."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from app.cli.terminal import CacheOption, JsonOption, YesOption, examples, model_option, size
from app.paths import features_folder
from clipkit.errors import InputError
from clipkit.wording import count, printable

EPILOG = examples(
    "clipkit cache",
    "clipkit cache --empty",
    "clipkit cache --empty --model runs/mine --yes",
)


def cache(
    cache: CacheOption = None,
    empty: Annotated[bool, typer.Option("--empty", help="Remove the features.")] = False,
    model: Annotated[
        str | None,
        model_option(
            help="Only those of this model, named as listed or by its id.", show_default="all"
        ),
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show or empty the feature cache of the evaluations.

    It holds the vectors of pictures and texts, so that they are encoded once. Emptying it costs time
    only: the next evaluation encodes again. Other commands may run meanwhile. --json prints one
    object: cache, its folder; bytes; and the models, each with spec, encoder_id, precision, version,
    pictures and texts (numbers of vectors).
    """
    from eval.features import PREPROCESSING, FeatureCache

    folder = features_folder(cache)
    features = FeatureCache(folder)
    listed = models = features.models()
    if model is not None:
        models = [one for one in listed if model in (one.spec, one.encoder_id)]
        if not models:
            known = ", ".join(dict.fromkeys(one.spec or one.encoder_id for one in listed))
            raise InputError(f"the cache has nothing of model {model!r}; it has {known or 'none'}")
    vectors = sum(one.pictures + one.texts for one in models)
    if empty:
        question = f"Remove {count(vectors, 'vector')} from {printable(str(folder))}?"
        if vectors and not yes:
            typer.confirm(question, abort=True, err=True)
        features.remove(models)
        models = [one for one in listed if one not in models]
        print(f"{count(vectors, 'vector')} removed", file=sys.stderr if as_json else sys.stdout)
    used = sum(path.stat().st_size for path in folder.glob("vectors-*"))
    if as_json:
        rows = [asdict(one) for one in models]
        print(json.dumps({"cache": str(folder), "bytes": used, "models": rows}, indent=2))
        return
    print(f"cache      {printable(str(folder))}, {size(used)}")
    for one in models:
        old = (
            "" if one.version == PREPROCESSING else f"; of clipkit {one.version}, not used any more"
        )
        print(
            f"model      {printable(one.spec or 'unknown')} ({one.encoder_id}, {one.precision}): "
            f"{one.pictures:,} vectors of pictures, {one.texts:,} of texts{old}"
        )
    if not models:
        print("empty      the next evaluation fills it")
