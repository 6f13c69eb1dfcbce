"""Prompt templates and class names: the published sets, and the user's own files.

`templates.json` and `classes.json` hold OpenAI's prompt ensembles and class names for ImageNet and
the other common benchmarks, as OpenCLIP and CLIP Benchmark distribute them (MIT licence: see NOTICE),
and "plain", one template; "simple" are the seven that OpenAI found to do nearly as well as all 80.
Class names are in the order of the dataset's labels (for the benchmarks that torchvision reads, its
order). Spelling and double names ("missile" and "sunglasses" are two classes each of ImageNet) are
left as published: results would not be comparable otherwise.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from clipkit.errors import InputError

__all__ = ["Templates", "default_templates", "load_classes", "load_templates"]

PLACEHOLDERS = ("{}", "{c}", "{class}")
MAX_FILE = 64 * 2**20  # bytes; the published prompts per ImageNet class are 10 MB
_ALIASES = {
    "openai": "imagenet1k",
    "imagenet": "imagenet1k",
    "ilsvrc2012": "imagenet1k",
    "imagenetv2": "imagenet1k",
    "imagenetsketch": "imagenet1k",
    "stanfordcars": "cars",
    "fgvcaircraft2013b": "fgvc_aircraft",
    "aircraft": "fgvc_aircraft",
    "describabletextures": "dtd",
    "oxfordpets": "pets",
    "oxfordiiitpet": "pets",
    "oxfordflowers102": "flowers",
    "flowers102": "flowers",
    "vggflowers": "flowers",
    "patchcamelyon": "pcam",
    "svhncropped": "svhn",
}


@dataclass(frozen=True, slots=True)
class Templates:
    """Templates for every class, or prompts per class (as CuPL's, arXiv 2209.03320)."""

    name: str
    texts: tuple[str, ...] = ()  # each with at least one of PLACEHOLDERS
    per_class: Mapping[str, tuple[str, ...]] | None = None  # class name -> prompts

    def prompts(self, class_name: str) -> tuple[str, ...]:
        """Return a class's prompts. Raises InputError if it has none."""
        if self.per_class is None:
            return tuple(_fill(text, class_name) for text in self.texts)
        if class_name not in self.per_class:
            near = _nearest(class_name, self.per_class)
            raise InputError(f"prompts {self.name!r} have none for class {class_name!r}{near}")
        return self.per_class[class_name]


def load_templates(name_or_file: str | Path) -> Templates:
    """Load a known set by name, or a file: a template a line, or (`.json`) a list of templates or an
    object of class name -> list of prompts. Raises InputError if it is none of these."""
    sets = _shipped("templates.json")
    if (key := _set_name(name_or_file, sets)) is not None:
        return Templates(key, texts=sets[key])
    content = _read(name_or_file, "templates", sets)
    name = Path(name_or_file).name
    if isinstance(content, Mapping) and content:
        per_class = {c: _texts(t, f"{name}, class {c!r}") for c, t in content.items()}
        return Templates(name, per_class=per_class)
    texts = _texts(content, name)
    for number, text in enumerate(texts, start=1):
        if not any(mark in text for mark in PLACEHOLDERS):
            raise InputError(
                f"template {number} of {name} has no placeholder for the class name: {text!r}; "
                "write {} in its place"
            )
    return Templates(name, texts=texts)


def default_templates(dataset: str) -> Templates:
    """Return the set that belongs to a dataset's name (of a path, its last part), or "simple"."""
    sets = _shipped("templates.json")
    key = _canonical(dataset, sets) or "simple"
    return Templates(key, texts=sets[key])


def load_classes(name_or_file: str | Path) -> tuple[str, ...]:
    """Load class names: a known set by name, or a file with a name a line, or (`.json`) a list."""
    sets = _shipped("classes.json")
    if (key := _set_name(name_or_file, sets)) is not None:
        return sets[key]
    return _texts(_read(name_or_file, "class names", sets), Path(name_or_file).name)


def _fill(template: str, class_name: str) -> str:
    # Not str.format: a user's template may hold other braces.
    return re.sub(r"\{(?:c|class)?\}", lambda _: class_name, template)


@cache
def _shipped(file: str) -> dict[str, tuple[str, ...]]:
    text = (resources.files(__name__) / file).read_text(encoding="utf-8")
    return {name: tuple(texts) for name, texts in json.loads(text).items()}


def _canonical(name: str, sets: Mapping[str, object]) -> str | None:
    """Return the known set for a dataset's name: "CIFAR-10", "hf:clip-benchmark/wds_cifar10" ..."""
    last = re.split(r"[/\\:]", name.rstrip("/\\"))[-1].lower()
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"^(?:wds[_-])?(?:vtab[_-])?", "", last))
    plain = re.sub(r"[^a-z0-9]", "", _ALIASES.get(plain, plain))
    return next((key for key in sets if key.replace("_", "") == plain), None)


def _set_name(name_or_file: str | Path, sets: Mapping[str, object]) -> str | None:
    """Return the known set of that name; None for the path of a file in a folder."""
    path = Path(name_or_file)
    if len(path.parts) > 1 and path.is_file():
        return None
    return _canonical(str(name_or_file), sets)


def _read(path: str | Path, what: str, sets: Mapping[str, object]) -> object:
    """Return a file's JSON, or its lines. Raises InputError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{what} {str(path)!r} are neither a file nor a known set{_nearest(str(path), sets)}; "
            f"known sets: {', '.join(sorted(sets))}"
        )
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} is larger than {MAX_FILE // 2**20} MB, too large for {what}")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return json.loads(text)
        return [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {what} from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _texts(content: object, where: str) -> tuple[str, ...]:
    """Check that content is a list of texts, at least one and none empty."""
    if content in ([], {}):
        raise InputError(f"{where} is empty; give at least one text")
    if not isinstance(content, list):
        raise InputError(f"{where}: expected a list of texts, got {type(content).__name__}")
    for number, text in enumerate(content, start=1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: entry {number} is {text!r}; expected a text")
    return tuple(text.strip() for text in content)


def _nearest(name: str, sets: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, sets, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
