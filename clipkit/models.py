"""Which models there are, and which of them are on this disk, without torch and without a network.

OpenCLIP's architectures and pretrained tags are read from the files of the installed package:
importing it takes seconds, and a mistyped name should be refused at once.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipkit import checkpoint, scratch
from clipkit.checkpoint import TowerConfig
from clipkit.errors import ModelError

RUNS = Path("runs")  # where `clipkit train` puts its runs, unless it is told otherwise

# A repository's default file and what OpenCLIP looks for first: open_clip/pretrained.py,
# _get_safe_alternatives and HF_WEIGHTS_NAME.
_DEFAULT_FILE = "open_clip_pytorch_model.bin"
_DEFAULT_SAFE_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model, or an architecture for one's own weights, whose `spec` then ends in ":FILE"."""

    spec: str
    dim: int  # of an embedding
    image_size: tuple[int, int]  # height, width in pixels
    parameters: int | None  # of both towers; None: not known
    bytes: int | None  # of its weights on this disk; None: they are not here


def names_model(spec: str) -> bool:
    """Return whether the spec names a model on this disk, or one that a hub may have."""
    if checkpoint.find_folder(spec) is not None or spec.startswith("hf-hub:"):
        return True
    if named := scratch.parse(spec):
        return named[0] in scratch.RESNETS or named[0] in architectures()
    if weights := checkpoint.weights_file(spec):
        return weights[0] in architectures()
    architecture, _, tag = spec.rpartition("/")
    return tag in pretrained().get(architecture, ())


def is_gone(spec: str) -> bool:
    """Return whether the spec names a folder or a file that is not there."""
    return "/" in spec and not names_model(spec)


def check(spec: str) -> None:
    """Raise ModelError, with the nearest names, if the spec names no model."""
    if names_model(spec):
        return
    if Path(spec).expanduser().is_file():
        raise ModelError(
            f"{spec} is a file of weights, which does not say what they are of; name the "
            f"architecture too: --model {_trained_architecture(spec) or 'ARCHITECTURE'}:{spec}"
        )
    if named := scratch.parse(spec):
        names = [*scratch.RESNETS, *architectures()]
        meant = _nearest(named[0], names, cutoff=0.6) if named[0] else ()
        near = [f"{scratch.PREFIX}{name}" for name in meant]
        question = f"did you mean {' or '.join(near)}? Use " if near else "use "
        raise ModelError(
            f"there is no architecture {named[0]!r}; {question}scratch:NAME or scratch:NAME:SEED "
            f"with {', '.join(scratch.RESNETS)}, or an architecture that `clipkit models` lists"
        )
    head = spec if spec in architectures() else re.split("[:/]", spec, maxsplit=1)[0]
    rest = spec[len(head) + 1 :]
    if spec.startswith(("/", "~", ".", "local-dir:")):
        raise ModelError(f"there is no checkpoint at {spec}; check the path")
    if head not in architectures() and checkpoint.weights_file(spec):
        problem = f"OpenCLIP has no architecture {head}"
        near = [f"{name}:{rest}" for name in _nearest(head, list(architectures()))]
    elif head not in architectures():
        problem = f"model {spec!r} is unknown"
        near = _nearest(spec, [row.spec for row in list_models() if not row.spec.endswith(":FILE")])
    elif rest.endswith(checkpoint.WEIGHTS_SUFFIXES):
        raise ModelError(f"there is no file {rest} with weights of {head}; check the path")
    else:
        problem = f"{head} has no pretrained tag {rest!r}" if rest else f"{head} names no weights"
        tags = list(pretrained().get(head, ()))
        near = [f"{head}/{tag}" for tag in _nearest(rest, tags, cutoff=0.0)] or [f"{head}:FILE"]
    if near:
        raise ModelError(f"{problem}; did you mean {' or '.join(near)}? All: clipkit models")
    raise ModelError(
        f"{problem}: use builtin, ARCHITECTURE/TAG such as ViT-B-32/laion2b_s34b_b79k, "
        "ARCHITECTURE:FILE, hf-hub:ORG/NAME, scratch:ARCHITECTURE, or the folder of a checkpoint; "
        "all: clipkit models"
    )


def list_models(words: Sequence[str] = ()) -> list[ModelRow]:
    """Return the models whose spec contains every one of `words`, in any letter case.

    These are the built-in model, the runs in the working folder, the random starts for pictures of
    32 pixels, OpenCLIP's pretrained models, and its architectures that come without weights.
    """
    wanted = [word.casefold() for word in words]
    return [row for row in _rows() if all(word in row.spec.casefold() for word in wanted)]


def _rows() -> Iterator[ModelRow]:
    for spec in ("builtin", *map(str, sorted(RUNS.glob("*")))):
        folder = checkpoint.find_folder(spec)
        if folder is not None and (folder / checkpoint.WEIGHTS_FILE).is_file():
            with suppress(ModelError):  # damaged files: not a model
                yield _folder_row(spec, folder)
    for name in scratch.RESNETS:
        config = TowerConfig.from_open_clip(*scratch.settings(name))
        yield ModelRow(f"{scratch.PREFIX}{name}", config.dim, config.image_size, None, None)
    counts = json.loads((Path(__file__).parent / "towers" / "parameters.json").read_text("utf-8"))
    for architecture, model_cfg in architectures().items():
        config = TowerConfig.from_open_clip(model_cfg, {})
        facts = (config.dim, config.image_size, counts.get(architecture))
        tags = pretrained().get(architecture, {})
        for tag, source in tags.items():
            yield ModelRow(f"{architecture}/{tag}", *facts, _fetched_bytes(source))
        if not tags:
            yield ModelRow(f"{architecture}:FILE", *facts, None)


def _folder_row(spec: str, folder: Path) -> ModelRow:
    config = TowerConfig.from_open_clip(*checkpoint.read_config(folder))
    weights = folder / checkpoint.WEIGHTS_FILE
    parameters = checkpoint.count_values(weights)
    return ModelRow(spec, config.dim, config.image_size, parameters, weights.stat().st_size)


def _fetched_bytes(source: str) -> int | None:
    """Return the size of a pretrained model's file in the hub's cache, None if it is not there.

    `source` is ORG/NAME/FILE, or ORG/NAME/ for the default file.
    """
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = source.rpartition("/")
    names = [f"{file.rpartition('.')[0]}.safetensors", file]
    for name in names if file else (_DEFAULT_SAFE_FILE, _DEFAULT_FILE):
        if isinstance(path := try_to_load_from_cache(repository, name), str):
            return Path(path).stat().st_size
    return None


def _nearest(text: str, names: Sequence[str], *, cutoff: float = 0.75) -> list[str]:
    """Return up to three names that begin with `text`, or else are spelt like it, the nearest first."""
    from difflib import get_close_matches

    text, folded = text.casefold(), {name.casefold(): name for name in names}
    near = [key for key in folded if key.startswith(text)]
    near += get_close_matches(text, folded, 3, cutoff)
    return [folded[key] for key in dict.fromkeys(near)][:3]


def _trained_architecture(file: str) -> str | None:
    """Return the architecture that open_clip_train noted for LOGS/NAME/checkpoints/FILE."""
    try:
        notes = (Path(file).expanduser().parent.parent / "params.txt").read_text("utf-8")
    except OSError:
        return None
    noted = re.search(r"^model: (.+)$", notes, re.MULTILINE)
    quick = "-quickgelu" if re.search(r"^force_quick_gelu: True$", notes, re.MULTILINE) else ""
    names = (f"{noted[1]}{quick}", noted[1]) if noted else ()
    return next((name for name in names if name in architectures()), None)


# ---- what OpenCLIP's own files say


@cache
def architectures() -> Mapping[str, Mapping[str, Any]]:
    """Return OpenCLIP's architectures, each with its model_cfg, sorted as numbers count."""
    configs = {
        file.stem: json.loads(file.read_text("utf-8"))
        for file in (_open_clip() / "model_configs").glob("*.json")
    }
    return dict(sorted(configs.items(), key=lambda item: _natural(item[0])))


@cache
def pretrained() -> Mapping[str, Mapping[str, str]]:
    """Return OpenCLIP's pretrained tags by architecture, each with its file on the hub."""
    tables: dict[str, Any] = {}
    for node in ast.parse((_open_clip() / "pretrained.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = _read(node.value, tables)
    tags: dict[str, dict[str, str]] = {}
    for architecture, table in tables["_PRETRAINED"].items():
        tags[architecture] = {tag: settings["hf_hub"] for tag, settings in table.items()}
        # As pretrained.py adds them: each also under a name that says its activation.
        quick = {tag: tags[architecture][tag] for tag, s in table.items() if s.get("quick_gelu")}
        if quick:
            tags[f"{architecture}-quickgelu"] = quick
    return tags


def _read(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the value of a constant, a dict, or a call with keywords such as dict(a=1)."""
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name):
            return names.get(name)
        case ast.Dict(keys, values):
            pairs = zip(keys, values, strict=True)
            return {_read(key, names): _read(value, names) for key, value in pairs if key}
        case ast.Call(keywords=keywords):
            return {keyword.arg: _read(keyword.value, names) for keyword in keywords}
    return None


def _open_clip() -> Path:
    """Return the folder of the installed OpenCLIP, which is not imported for that."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModelError("OpenCLIP is not installed; install it: pip install open-clip-torch")
    return Path(package.origin).parent


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
