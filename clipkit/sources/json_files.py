"""JSON: a line a picture, COCO's captions, Karpathy's splits, corrections made in the app."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import DatasetError
from clipkit.records import parse_object
from clipkit.sources.columns import Columns, choose
from clipkit.sources.rows import Broken, Options, Pictures, RawPair, Source, split_name, strings

_MOST_LINE = 16 * 2**20  # bytes
_SAMPLE = 200


def open_jsonl(path: Path, options: Options) -> Source:
    """One JSON object a line (or one list of objects): the fields by their names, as in a table."""
    sample = [
        fields for _, fields in itertools.islice(read_lines(path), _SAMPLE) if fields is not None
    ]
    if not sample:
        raise DatasetError(f"{path} holds no JSON objects; it needs one a line")
    shown = [{key: _first(value) for key, value in row.items()} for row in sample]
    columns = choose(shown, options, where=str(path))
    pictures = Pictures(path.parent, options.pictures)

    def pairs() -> Iterator[RawPair | Broken]:
        return object_pairs(read_lines(path), columns, pictures.pair, options.split)

    return Source("jsonl", str(path), str(columns), _count_lines(path), pairs)


def object_pairs(
    rows: Iterator[tuple[str, dict[str, Any] | None]],
    columns: Columns,
    pair: Callable[..., RawPair | Broken],
    split: str | None,
) -> Iterator[RawPair | Broken]:
    """The pairs of rows that are dictionaries, None for a broken one."""
    for row, given in rows:
        if given is None:
            yield Broken(row, "not-json", "the line is not one JSON object")
            continue
        fields = dict(given)
        name = fields.pop(columns.image, None)
        captions: list[str] = []
        wrong = None
        for column in columns.captions:
            value = fields.pop(column, None)
            found = strings(value) if value is not None else ()
            if found is None:
                wrong = f"{column} must be a string or a list of strings, got {value!r:.80}"
            captions += found or ()
        if wrong is not None:
            yield Broken(row, "wrong-type", wrong)
            continue
        said = fields.pop(columns.split, None) if columns.split else None
        tags = fields.pop(columns.tags, None) if columns.tags else None
        meta: dict[str, Any] = {}
        if tags:
            listed = tags.split(",") if isinstance(tags, str) else strings(tags) or ()
            meta["keywords"] = [tag.strip() for tag in listed if tag.strip()]
        meta |= fields
        yield pair(name, row, tuple(captions), split_name(said) or split, meta)


def open_coco(path: Path, options: Options) -> Source:
    """captions_train2017.json: `images` with their file names, `annotations` with a caption each."""
    whole = _load(path)
    captions: dict[Any, list[str]] = {}
    for note in whole["annotations"]:
        if isinstance(note, dict) and isinstance(note.get("caption"), str):
            captions.setdefault(note.get("image_id"), []).append(note["caption"])
    split = options.split
    year = "".join(c for c in path.stem if c.isdigit())
    folders = [f"{word}{year}" for word in ("train", "val", "test")]
    home = path.parent.parent if path.parent.name == "annotations" else path.parent
    pictures = Pictures(home, options.pictures, also=(*folders, *(f"images/{f}" for f in folders)))

    def pairs() -> Iterator[RawPair | Broken]:
        known = set()
        for number, image in enumerate(whole["images"]):
            row = f"images[{number}]"
            if not isinstance(image, dict):
                yield Broken(row, "wrong-type", f"an image must be an object, got {image!r:.80}")
                continue
            known.add(image.get("id"))
            said = tuple(captions.get(image.get("id"), ()))
            meta = {"coco_id": image["id"]} if "id" in image else {}
            yield pictures.pair(image.get("file_name"), row, said, split, meta)
        for number, note in enumerate(whole["annotations"]):
            row = f"annotations[{number}]"
            if not isinstance(note, dict) or not isinstance(note.get("caption"), str):
                yield Broken(row, "wrong-type", f"an annotation needs a caption: {note!r:.80}")
            elif note.get("image_id") not in known:
                yield Broken(row, "unknown-picture", f"no image has the id {note.get('image_id')}")

    total = len(whole["images"])
    says = f"COCO captions, {total:,} pictures" + (f", split {split}" if split else "")
    return Source("coco", str(path), says, total, pairs)


def open_karpathy(path: Path, options: Options) -> Source:
    """dataset_flickr8k.json, dataset_coco.json: sentences and split by picture; restval trains."""
    whole = _load(path)
    pictures = Pictures(path.parent, options.pictures)

    def pairs() -> Iterator[RawPair | Broken]:
        for number, image in enumerate(whole["images"]):
            row = f"images[{number}]"
            if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
                yield Broken(row, "wrong-type", f"an image needs sentences: {image!r:.80}")
                continue
            captions = tuple(
                said["raw"]
                for said in image["sentences"]
                if isinstance(said, dict) and isinstance(said.get("raw"), str)
            )
            name = image.get("filename")
            folder = image.get("filepath")  # COCO's: "val2014"
            if isinstance(folder, str) and isinstance(name, str) and folder:
                name = f"{folder}/{name}" if pictures.find(f"{folder}/{name}") else name
            yield pictures.pair(
                name, row, captions, split_name(image.get("split")) or options.split
            )

    total = len(whole["images"])
    says = f"Karpathy's split of {whole.get('dataset', path.stem)}, {total:,} pictures"
    return Source("karpathy", str(path), says, total, pairs)


def open_corrections(path: Path, options: Options) -> Source:
    """What somebody said of search results: {"picture", "query", "right": true or false} a line.

    A right one makes the query a caption; a wrong one is kept as `not_captions` of the picture.
    """
    pictures = Pictures(path.parent, options.pictures)

    def pairs() -> Iterator[RawPair | Broken]:
        for row, fields in read_lines(path):
            if fields is None:
                yield Broken(row, "not-json", "the line is not one JSON object")
                continue
            query, right = fields.get("query"), fields.get("right")
            if not isinstance(query, str) or not isinstance(right, bool):
                detail = f"needs a query and right true or false: {fields!r:.120}"
                yield Broken(row, "wrong-type", detail)
                continue
            captions = (query,) if right else ()
            meta = {} if right else {"not_captions": [query]}
            name = fields.get("picture", fields.get("image"))
            yield pictures.pair(name, row, captions, None, meta)

    says = "corrections: right queries become captions, wrong ones are kept as not_captions"
    return Source("corrections", str(path), says, _count_lines(path), pairs)


def json_kind(path: Path) -> str:
    """Which of this module's readers a .json or .jsonl file is for, told by what it holds."""
    if path.suffix.lower() == ".json":
        whole = _load(path)
        if isinstance(whole, dict) and isinstance(whole.get("images"), list):
            if isinstance(whole.get("annotations"), list):
                return "coco"
            if any(isinstance(i, dict) and "sentences" in i for i in whole["images"][:20]):
                return "karpathy"
        if not isinstance(whole, list):
            keys = ", ".join(list(whole)[:12]) if isinstance(whole, dict) else type(whole).__name__
            raise DatasetError(
                f"{path} is neither COCO captions (images, annotations) nor Karpathy's split "
                f"(images with sentences) nor a list of objects; it holds {keys}"
            )
    for _, fields in itertools.islice(read_lines(path), 20):
        if fields is not None:
            return "corrections" if {"query", "right"} <= fields.keys() else "jsonl"
    return "jsonl"


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """("line 7", object) of each line that is not blank, None for one that is no object."""
    if path.suffix.lower() == ".json":
        for number, item in enumerate(_load(path)):
            yield f"[{number}]", item if isinstance(item, dict) else None
        return
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE):
                number += 1
                if line.strip():
                    yield f"line {number}", _object(line)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(line)
    except ValueError:
        return None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        hint = "; name it .jsonl if it has an object a line" if "Extra data" in str(error) else ""
        raise DatasetError(f"{path} is not JSON: {error}{hint}") from None


def _count_lines(path: Path) -> int | None:
    if path.suffix.lower() == ".json":
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _first(value: object) -> object:
    """What the choice of columns looks at: of a list, its first entry."""
    if isinstance(value, list) and value:
        return value[0]
    return value.get("path") if isinstance(value, Mapping) else value
