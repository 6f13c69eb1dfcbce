"""Flickr8k and Flickr30k as they are handed out: a token file and lists of the official splits.

Flickr8k.token.txt and results_20130124.token hold `1000268201_693b08cb0e.jpg#0<tab>A child in ...`,
five lines a picture. The splits are lists of names beside it or one folder on:
Flickr_8k.trainImages.txt, .devImages.txt, .testImages.txt, or train.txt, val.txt, test.txt (without
suffixes in the 30k version).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipkit.errors import DatasetError
from clipkit.sources.rows import Broken, Options, Pictures, RawPair, Source

_LISTS = {
    "train": ("Flickr_8k.trainImages.txt", "Flickr30k.trainImages.txt", "train.txt"),
    "validation": ("Flickr_8k.devImages.txt", "Flickr30k.devImages.txt", "val.txt", "dev.txt"),
    "test": ("Flickr_8k.testImages.txt", "Flickr30k.testImages.txt", "test.txt"),
}


def open_flickr(path: Path, options: Options) -> Source:
    """Flickr8k or 30k by its token file, or a folder that holds one. DatasetError if there is none."""
    if path.is_dir():
        found = token_files(path)
        if not found:
            raise DatasetError(f"{path} holds no token file such as Flickr8k.token.txt")
        path = found[0]
    splits = _official(path.parent)
    home = path.parent.parent if path.parent.name.lower().startswith("flickr") else path.parent
    pictures = Pictures(path.parent, options.pictures, also=(str(home), *_beside(home)))
    with path.open("rb") as file:
        total = sum(1 for _ in file)

    def pairs() -> Iterator[RawPair | Broken]:
        for name, said in itertools.groupby(_captions(path), lambda line: line[1]):
            lines = list(said)
            row = f"line {lines[0][0]}"
            if name is None:
                for number, _, text in lines:
                    detail = f"not NAME#NUMBER, a tab and a caption: {text:.120}"
                    yield Broken(f"line {number}", "no-tab", detail)
                continue
            captions = tuple(text for _, _, text in lines)
            split = splits.get(name) or splits.get(PurePosixPath(name).stem, options.split)
            yield pictures.pair(name, row, captions, split)

    counts = {split: list(splits.values()).count(split) for split in _LISTS}
    named = ", ".join(f"{split} {count:,}" for split, count in counts.items() if count)
    says = f"Flickr tokens, official splits: {named or 'none found beside it'}"
    return Source("flickr", str(path), says, max(1, total // 5), pairs)


def token_files(folder: Path) -> list[Path]:
    """Whole token files first: Flickr8k.lemma.token.txt and expert lists are others."""
    found = [p for p in sorted(folder.iterdir()) if ".token" in p.name and "lemma" not in p.name]
    return [p for p in found if p.is_file()]


def is_token_file(path: Path) -> bool:
    """Whether most of its first lines are `NAME.jpg#0<tab>caption`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = [line for line in itertools.islice(file, 20) if line.strip()]
    tokens = [line for line in head if "#" in line.split("\t")[0] and "\t" in line]
    return len(tokens) * 2 > len(head)


def _captions(path: Path) -> Iterator[tuple[int, str | None, str]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            key, tab, text = line.rstrip("\r\n").partition("\t")
            name, mark, _ = key.rpartition("#")
            if tab and mark and name:
                yield number, name.strip(), text
            elif line.strip():
                yield number, None, line.strip()


def _official(folder: Path) -> dict[str, str]:
    """Split by picture name, as far as the lists are there."""
    found: dict[str, str] = {}
    for split, names in _LISTS.items():
        for name in names:
            if (path := folder / name).is_file():
                words = path.read_text(encoding="utf-8", errors="replace").split()
                found |= dict.fromkeys(words, split)
                break
    return found


def _beside(home: Path) -> list[str]:
    """Flickr8k_text/ usually lies beside the pictures' folder."""
    return [str(p) for p in sorted(home.iterdir()) if p.is_dir() and p.name.lower() != "__macosx"]
