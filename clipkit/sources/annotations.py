"""The annotation files of published captioned data: COCO, Karpathy's splits, Flickr8k and Flickr30k."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.errors import DatasetError
from clipkit.sources.json_files import load_json
from clipkit.sources.rows import (
    Broken,
    Options,
    PictureFinder,
    Row,
    Source,
    count_lines,
    split_name,
)

# Flickr's official splits: lists of names beside the token file (the 30k version's without suffixes).
_LISTS = {
    "train": ("Flickr_8k.trainImages.txt", "Flickr30k.trainImages.txt", "train.txt"),
    "validation": ("Flickr_8k.devImages.txt", "Flickr30k.devImages.txt", "val.txt", "dev.txt"),
    "test": ("Flickr_8k.testImages.txt", "Flickr30k.testImages.txt", "test.txt"),
}


def open_coco(path: Path, options: Options) -> Source:
    """Open captions_train2017.json: `images` with file names, `annotations` with a caption each."""
    images, annotations = _lists(path, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for note in annotations:
        if isinstance(note, dict) and isinstance(note.get("caption"), str):
            captions.setdefault(note.get("image_id"), []).append(note["caption"])
    year = "".join(c for c in path.stem if c.isdigit())
    folders = [f"{word}{year}" for word in ("train", "val", "test")]
    home = path.parent.parent if path.parent.name == "annotations" else path.parent
    finder = PictureFinder(home, options, also=(*folders, *(f"images/{f}" for f in folders)))

    def rows() -> Iterator[Row | Broken]:
        ids = set()
        for number, image in enumerate(images):
            place = f"images[{number}]"
            if not isinstance(image, dict):
                detail = f"an image must be an object, got {image!r:.80}"
                yield Broken(place, "wrong-type", detail)
                continue
            ids.add(image.get("id"))
            own = tuple(captions.get(image.get("id"), ()))
            meta = {"coco_id": image["id"]} if "id" in image else {}
            yield finder.row(image.get("file_name"), place, own, split=options.split, meta=meta)
        for number, note in enumerate(annotations):
            place = f"annotations[{number}]"
            if not isinstance(note, dict) or not isinstance(note.get("caption"), str):
                yield Broken(place, "wrong-type", f"an annotation needs a caption: {note!r:.80}")
            elif note.get("image_id") not in ids:
                detail = f"no image has the id {note.get('image_id')}"
                yield Broken(place, "unknown-picture", detail)

    description = f"COCO captions, {len(images):,} pictures"
    description += f", split {options.split}" if options.split else ""
    return Source("coco", str(path), description, len(images), rows)


def open_karpathy(path: Path, options: Options) -> Source:
    """Open dataset_flickr8k.json, dataset_coco.json: `images` with sentences and a split each."""
    (images,) = _lists(path, "images")
    finder = PictureFinder(path.parent, options)

    def rows() -> Iterator[Row | Broken]:
        for number, image in enumerate(images):
            place = f"images[{number}]"
            if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
                yield Broken(place, "wrong-type", f"an image needs sentences: {image!r:.80}")
                continue
            captions = tuple(
                sentence["raw"]
                for sentence in image["sentences"]
                if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str)
            )
            name, folder = image.get("filename"), image.get("filepath")  # COCO's: "val2014"
            if isinstance(folder, str) and isinstance(name, str) and folder:
                name = f"{folder}/{name}" if finder.find(f"{folder}/{name}") else name
            split = split_name(image.get("split")) or options.split
            yield finder.row(name, place, captions, split=split)

    description = f"Karpathy's split of {path.stem}, {len(images):,} pictures"
    return Source("karpathy", str(path), description, len(images), rows)


def open_flickr(path: Path, options: Options) -> Source:
    """Open Flickr8k.token.txt or results_20130124.token: a line `NAME.jpg#0<tab>caption` a caption.

    `path` may be the folder of the token file. Raises DatasetError if there is none.
    """
    if path.is_dir():
        files = token_files(path)
        if not files:
            raise DatasetError(f"{path} holds no token file such as Flickr8k.token.txt")
        path = files[0]
    splits = _official_splits(path.parent)
    home = path.parent.parent if path.parent.name.lower().startswith("flickr") else path.parent
    below = (p for p in sorted(home.iterdir()) if p.is_dir() and p.name.lower() != "__macosx")
    # Flickr8k_text/ usually lies beside the pictures' folder.
    finder = PictureFinder(path.parent, options, also=(str(home), *map(str, below)))

    def rows() -> Iterator[Row | Broken]:
        for name, group in itertools.groupby(_token_lines(path), lambda line: line[1]):
            lines = list(group)
            if name is None:
                for number, _, text in lines:
                    detail = f"not NAME#NUMBER, a tab and a caption: {text:.120}"
                    yield Broken(f"line {number}", "no-tab", detail)
                continue
            captions = tuple(text for _, _, text in lines)
            split = splits.get(name) or splits.get(PurePosixPath(name).stem, options.split)
            yield finder.row(name, f"line {lines[0][0]}", captions, split=split)

    counts = {split: list(splits.values()).count(split) for split in _LISTS}
    listed = ", ".join(f"{split} {count:,}" for split, count in counts.items() if count)
    description = f"Flickr tokens, official splits: {listed or 'none found beside it'}"
    return Source("flickr", str(path), description, max(1, count_lines(path) // 5), rows)


def token_files(folder: Path) -> list[Path]:
    """Return the folder's token files; not Flickr8k.lemma.token.txt, whose captions are lemmatised."""
    paths = [p for p in sorted(folder.iterdir()) if ".token" in p.name and "lemma" not in p.name]
    return [p for p in paths if p.is_file()]


def is_token_file(path: Path) -> bool:
    """Return whether most of the first lines are `NAME.jpg#0<tab>caption`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = [line for line in itertools.islice(file, 20) if line.strip()]
    tokens = [line for line in head if "#" in line.split("\t")[0] and "\t" in line]
    return len(tokens) * 2 > len(head)


def _token_lines(path: Path) -> Iterator[tuple[int, str | None, str]]:
    """Yield (line number, picture or None, caption or the line)."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            key, tab, text = line.rstrip("\r\n").partition("\t")
            name, mark, _ = key.rpartition("#")
            if tab and mark and name:
                yield number, name.strip(), text
            elif line.strip():
                yield number, None, line.strip()


def _official_splits(folder: Path) -> dict[str, str]:
    """Return the split of each picture name in the lists that are there."""
    splits: dict[str, str] = {}
    for split, names in _LISTS.items():
        for name in names:
            if (path := folder / name).is_file():
                pictures = path.read_text(encoding="utf-8", errors="replace").split()
                splits |= dict.fromkeys(pictures, split)
                break
    return splits


def _lists(path: Path, *keys: str) -> list[list[Any]]:
    whole = load_json(path)
    for key in keys:
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            raise DatasetError(f"{path} has no list {key!r}; the format needs {', '.join(keys)}")
    return [whole[key] for key in keys]
