"""Data in plain files: folders of pictures, and JSONL files that name them."""

from __future__ import annotations

from pathlib import Path

from clipkit.embed.walk import Problem, walk
from clipkit.errors import DatasetError, InputError
from clipkit.records import FolderCaptions, Texts, parse_object
from eval.source import SPLIT_NAMES, Files, Label, Source, choose_split, read_fields

METADATA = "metadata.jsonl"


def split_folder(root: Path, split: str | None) -> tuple[Path, str | None]:
    """The folder of one split, and its name; the folder itself where there are no splits.

    Folders are splits only if all bear a split's name or one holds metadata or shards: CIFAR-100 has
    a class "train".
    """
    below = _subfolders(root)
    named = [folder for folder in below if folder.name in SPLIT_NAMES]
    are_splits = named and (
        len(named) == len(below)
        or any((f / METADATA).is_file() or any(f.glob("*.tar")) for f in named)
    )
    if not are_splits and split is None:
        return root, None
    available = [folder.name for folder in (named if are_splits else below)]
    if not available:
        raise InputError(f"{root} has no splits, so none called {split!r}; leave out --split")
    name = choose_split(available, split, where=str(root))
    return root / name, name


def _subfolders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def read_lines(path: Path) -> Source:
    """A JSONL file. DatasetError names the line that is wrong."""
    texts: dict[str, Texts] = {}
    labels: dict[str, Label | None] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    fields = parse_object(line)
                    name = fields.get("image", fields.get("file_name"))
                    if not isinstance(name, str) or not name or "\0" in name:
                        raise ValueError("no picture is named; give `image` or `file_name`")
                    more, label = read_fields(fields)
                    if labels.setdefault(name, label) != label:
                        raise ValueError(f"{name} had another label before")
                    said = texts.get(name, Texts())
                    texts[name] = Texts(said.captions + more.captions, said.tags + more.tags)
                except ValueError as error:
                    raise DatasetError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None
    if not texts:
        raise DatasetError(f"{path} names no picture; give one JSON object a line")
    found = list(labels.values())
    return Source(
        Files(path.parent, tuple(texts)),
        texts=list(texts.values()),
        labels=None if all(label is None for label in found) else found,
    )


def captioned_folder(root: Path, data: str) -> Source:
    """The pictures that a folder's metadata.jsonl names, or else all that lie below it, with the
    captions beside them."""
    if (root / METADATA).is_file():
        return read_lines(root / METADATA)
    paths, warnings = _pictures_below(root)
    if not paths:
        raise InputError(f"{data} holds no pictures; name a folder that does")
    beside = FolderCaptions()
    texts = [beside.for_picture(root / path) for path in paths]
    return Source(Files(root, tuple(paths)), texts=texts, warnings=warnings)


def class_folders(root: Path, data: str, *, by_domain: bool) -> Source:
    """A folder per class, or a folder per domain that holds them; or the labels in metadata.jsonl."""
    if (root / METADATA).is_file() and (told := read_lines(root / METADATA)).labels is not None:
        return told
    domains = _subfolders(root) if by_domain else [root]
    paths: list[str] = []
    labels: list[str] = []
    belongs: list[str] = []
    names: set[str] = set()
    warnings: tuple[str, ...] = ()
    for domain in domains:
        for folder in _subfolders(domain):
            names.add(folder.name)
            found, problems = _pictures_below(folder)
            below = folder.relative_to(root).as_posix()
            paths += [f"{below}/{path}" for path in found]
            labels += [folder.name] * len(found)
            belongs += [domain.name] * len(found)
            warnings += problems
    if not paths:
        what = "domain folders with class folders" if by_domain else "class folders"
        raise InputError(
            f"{data} holds no {what} with pictures; put each class's pictures in a folder of its name"
        )
    return Source(
        Files(root, tuple(paths)),
        labels=labels,
        classes=tuple(sorted(names)),
        domains=tuple(belongs) if by_domain else None,
        warnings=warnings,
    )


def _pictures_below(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    paths, problems = [], []
    for item in walk(str(folder), skip=""):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            paths.append(Path(item.path).relative_to(folder).as_posix())
    if not problems:
        return paths, ()
    first = problems[0]
    return paths, (f"{len(problems)} below {folder} left out, first {first.path}: {first.message}",)
