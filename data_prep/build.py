"""Build a dataset from sources: read, clean, compare, split, write, in two passes over the disk.

    sources ── load (threads): decode, hash, link ──▶ spool + pool of pictures     (staging folder)
    spool ── merge a picture's rows ── look-alikes ── splits ──▶ train/ validation/ test/   (renamed)

About 1 kB a picture stays in memory: identity, perceptual hash, offsets of its rows, hashes of its
captions; pictures and captions themselves do not. All files go into a hidden folder beside the
target, which is renamed after its last file, dataset.json, is written. An interrupted build removes
that folder; after a kill the next build does.

An imagefolder has SPLIT/metadata.jsonl beside the pictures, one object a line, with the same columns
in the same order on every line of every split:

    file_name   IMAGE_ID.jpg
    image_id    BLAKE2b-128 of the source's bytes, 32 hex digits
    captions    [one or more; none only with rules.uncaptioned="keep"]
    label       the class's name, or "" if it has none; only if any picture of the sources has one
    keywords, not_captions    [any number]; only if the sources have any
    width, height             of the picture beside it, pixels
    source      "captions.csv, line 12"
    meta        the source's other columns, as JSON text

`meta` is text because Arrow must find one type per column, the same in every split: nulls, mixed
numbers, dates in one split only, and names such as "thumb_file_name" would each break
`datasets.load_dataset`. For the same reason the first list of a split may end with "", which readers
leave out. (Labels that are all dates do become dates there.) Shards have the same columns in each
picture's .json, `meta` as an object; pictures without a caption have no .txt.

A picture has one label. A row with several classes gives none; of rows with different labels the first
counts; both are listed in rejected.jsonl.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from clipkit.embed import in_order
from clipkit.errors import DatasetError, InputError
from clipkit.images import Limits
from clipkit.records import METADATA, SPLITS
from clipkit.sources import (
    Broken,
    Options,
    Picture,
    PictureBytes,
    Row,
    Source,
    TarMember,
    ZipMember,
    open_source,
)
from clipkit.sources.rows import LISTS
from data_prep.clean import (
    LabelError,
    Rules,
    caption_fault,
    kind_of_repair,
    label_text,
    mend,
    same_caption,
)
from data_prep.load import Fault, Loaded, Loader
from data_prep.split import HASH_BYTES, Fractions, assign, groups_of, near_pairs
from data_prep.staging import MANIFEST, Built, Progress, aside, check_out, swap, write_manifest

REJECTED = "rejected.jsonl"
_SPOOL, _MERGED = "spool.jsonl", "merged.jsonl"
# Of several official splits of a picture the last counts: test pictures must not be trained on.
_RANK = {split: rank for rank, split in enumerate((None, *SPLITS))}

Record = dict[str, Any]  # the columns above, `meta` as a dictionary


def build(
    sources: Sequence[Source],
    out: Path,
    *,
    rules: Rules | None = None,
    fractions: Fractions | None = None,
    seed: int = 0,
    resize: int | None = None,
    shards: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    limits: Limits | None = None,
    command: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> Built:
    """Build the dataset folder `out` from all sources together.

    Pictures are hard-linked where the file system can, else copied; `resize` encodes larger ones
    again. `shards` writes WebDataset tars instead of an imagefolder. Equal files become one picture
    with all their captions. Every rejected row, picture and caption is listed in rejected.jsonl.

    Raises InputError if `out` exists and is not a dataset, or `overwrite` is not given; if a source
    gives no pictures; or if none is left, or none with a caption where `rules` reject the others. Any
    exception, KeyboardInterrupt included, leaves `out` unchanged.
    """
    out = Path(os.path.abspath(out.expanduser()))
    check_out(out, sources, overwrite)
    rules, fractions, limits = rules or Rules(), fractions or Fractions(), limits or Limits()
    with aside(out) as folder:
        pool = folder / "pool"
        pool.mkdir()
        loader = Loader(pool, rules, limits, resize, jpeg=shards)
        with ExitStack() as stack:
            run = _Build(folder, loader, on_progress or (lambda _: None), stack)
            for source in sources:
                run.read(source, workers or os.cpu_count() or 1)
            lists = run.merge()
            splits = run.split(fractions, seed)
            with closing(ShardWriter(folder) if shards else FolderWriter(folder, lists)) as writer:
                run.write(writer, splits, pool)
        shutil.rmtree(pool)
        for name in (_SPOOL, _MERGED):
            (folder / name).unlink()
        built = Built(
            out,
            run.rows,
            {split: run.written[split] for split in SPLITS if run.written[split]},
            run.counts["captions"],
            dict(run.mended.most_common()),
            run.counts["groups"],
            run.counts["parted"],
            {what: dict(reasons.most_common()) for what, reasons in run.rejected.items()},
            f"{run.fingerprint:032x}",
            run.counts["uncaptioned"],
            dict(run.labels.most_common()),
        )
        options = {
            "rules": asdict(rules) | {"allow": sorted(rules.allow)},
            "fractions": asdict(fractions),
            **{"seed": seed, "resize": resize, "shards": shards},
        }
        write_manifest(folder / MANIFEST, built, sources, options=options, command=command)
        swap(folder, out)
    return built


def build_once(
    data: str,
    below: Path,
    *,
    uncaptioned: bool = False,
    command: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Path, Built | None]:
    """Build a dataset of the source `data` in a folder below `below`, unless that was done before.

    With `uncaptioned` pictures without a caption stay, for methods that need none, and the folder has
    another name.

    The folder's name holds a hash of the rows and of the files' sizes and times: a changed source
    gives another folder, and runs that began on the former one can be resumed. Of a hub dataset only
    the name counts. Several processes may call this at once; one builds. Returns the folder, and the
    result of the build, or None if the dataset was there. Raises InputError as `build` does.
    """
    from filelock import FileLock

    source = open_source(data, options=Options(uncaptioned=uncaptioned))
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(data).stem).strip("-.") or "data"
    kind = "-uncaptioned" if uncaptioned else ""
    out = below / f"{name[:40]}{kind}-{_rows_hash(source)}"
    rules = Rules(uncaptioned="keep" if uncaptioned else "reject")
    try:
        below.mkdir(parents=True, exist_ok=True)
        with FileLock(below / f".{out.name}.lock"):
            if (out / MANIFEST).is_file():
                return out, None
            return out, build([source], out, rules=rules, command=command, on_progress=on_progress)
    except OSError as error:
        raise InputError(f"cannot write into {below}: {error.strerror or error}") from error


def _rows_hash(source: Source) -> str:
    """Return 12 hex digits that change with the rows of a source and with their files."""
    digest = blake2b(f"{source.kind} {source.path}".encode("utf-8", "surrogateescape"))
    for row in () if source.path.startswith("hf:") else source.rows():
        if isinstance(row, Broken):
            content: list[Any] = [row.place, row.reason]
        else:
            content = [row.name, row.captions, row.split, dict(row.meta), *_stamp(row.picture)]
            content += [] if row.label is None else [row.label]
        digest.update(json.dumps(content, default=str).encode())
    return digest.hexdigest()[:12]


def _stamp(picture: Picture) -> tuple[object, ...]:
    """Return what changes with a picture: its place, and its file's size and time, or its content."""
    if isinstance(picture, PictureBytes):
        return (blake2b(picture.data).hexdigest(),)
    file = picture.path
    if isinstance(picture, TarMember | ZipMember):
        file = picture.tar if isinstance(picture, TarMember) else picture.zip
    if file is None or not file.exists():
        return (str(file),)
    status = file.stat()
    return (repr(picture), status.st_size, status.st_mtime_ns)


class _Build:
    """The state of one build: call `read` for each source, then `merge`, `split`, `write`."""

    def __init__(
        self,
        folder: Path,
        loader: Loader,
        on_progress: Callable[[Progress], None],
        stack: ExitStack,
    ) -> None:
        self.loader = loader
        self.rules = loader.rules
        self.on_progress = on_progress
        self.rows = 0
        self.counts: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.rejected: dict[str, Counter[str]] = {}
        self.fingerprint = 0
        self._spool = stack.enter_context((folder / _SPOOL).open("w+b"))
        self._merged = stack.enter_context((folder / _MERGED).open("w+b"))
        self._list = stack.enter_context((folder / REJECTED).open("w", encoding="utf-8"))
        self._numbers: dict[str, int] = {}  # image_id -> the picture's number, from 0
        self._offsets: list[list[int]] = []  # of its rows in the spool
        self._looks = bytearray()
        self._first: Broken | None = (
            None  # what is wrong with the source's first row that is rejected
        )
        self._official: list[str | None] = []
        self._labels: list[str | None] = []
        self._loaded: dict[str, int | Fault | None] = {}  # by path; None: still loading
        self._repeats: Counter[int] = Counter()  # hash of a caption -> pictures that have it

    # ---- the first pass

    def read(self, source: Source, workers: int) -> None:
        """Load a source's pictures in threads, and spool its rows in the source's order."""
        self._first = None
        done, start = 0, self._spool.tell()
        for done, (row, future) in enumerate(in_order(source.rows(), self._start, workers), 1):
            if isinstance(row, Broken):
                self._first = self._first or row
                self._reject("row", source, row.place, row.reason, row.detail)
            else:
                self._take(source, row, future)
            self._report("reading", done, source.total)
        self.rows += done
        if self._spool.tell() == start:
            raise source.nothing_read(done, self._first)

    def _start(self, pool: ThreadPoolExecutor, row: Row | Broken) -> Future[Loaded | Fault] | None:
        """Start to load a picture; None for a broken row and for a file that was loaded before."""
        if isinstance(row, Broken):
            return None
        if row.picture.path is not None:
            path = os.path.abspath(row.picture.path)
            if path in self._loaded:
                return None
            self._loaded[path] = None
        return pool.submit(self.loader, row.picture)

    def _take(self, source: Source, row: Row, future: Future[Loaded | Fault] | None) -> None:
        """Spool a row whose picture is loaded, or reject it."""
        entry: dict[str, Any] = {"name": row.name, "path": source.path, "row": row.place}
        path = os.path.abspath(row.picture.path) if row.picture.path is not None else None
        if future is None:
            assert path is not None
            result = self._loaded[path]
        else:
            loaded = future.result()
            if isinstance(loaded, Fault):
                result = loaded
            elif (number := self._numbers.get(loaded.image_id)) is None:
                result = self._numbers[loaded.image_id] = len(self._numbers)
                self._offsets.append([])
                self._official.append(None)
                self._looks += loaded.look
                entry |= {"file": loaded.file, "width": loaded.width, "height": loaded.height}
            else:
                result = number
                detail = f"the same file as {loaded.image_id}, which gets its captions"
                other = self._official[result]
                if row.split and other not in (None, row.split):
                    detail += f"; its splits are {other} and {row.split}: the later one counts"
                self._reject("picture", source, row.place, "duplicate", detail, row.name)
            if path is not None:
                self._loaded[path] = result
        if not isinstance(result, int):
            assert result is not None
            self._first = self._first or Broken(row.place, result.reason, result.detail)
            self._reject("picture", source, row.place, result.reason, result.detail, row.name)
            return
        self._official[result] = max(self._official[result], row.split, key=_RANK.__getitem__)
        entry |= {"captions": self._clean(source, row), "label": self._label(source, row)}
        entry["meta"] = dict(row.meta)
        self._offsets[result].append(self._spool.tell())
        self._spool.write(_line(entry))

    def _clean(self, source: Source, row: Row) -> list[str]:
        captions = []
        for original in row.captions:
            caption = mend(original)
            if reason := caption_fault(caption, self.rules):
                self._reject("caption", source, row.place, reason, original, row.name)
            else:
                captions.append(caption)
                if caption != original:
                    self.mended[kind_of_repair(original, caption)] += 1
        return captions

    def _label(self, source: Source, row: Row) -> str | None:
        try:
            return label_text(row.label, source.classes)
        except LabelError as error:
            self._reject("label", source, row.place, error.reason, str(error), row.name)
            return None

    # ---- between the passes: a picture's rows joined, look-alikes, splits

    def merge(self) -> list[str]:
        """Join each picture's rows into one line. Returns the list columns that are in use."""
        columns: set[str] = set()
        self._spool.flush()
        for image_id, number in self._numbers.items():
            rows = []
            for offset in self._offsets[number]:
                self._spool.seek(offset)
                rows.append(json.loads(self._spool.readline()))
            self._offsets[number] = []
            record = self._merge_rows(image_id, rows)
            self._labels.append(record.get("label"))
            columns |= {name for name in LISTS if record.get(name)}
            self._repeats.update(hash(same_caption(c)) for c in record["captions"])
            self._merged.write(_line(record))
        return [name for name in LISTS if name in columns]

    def _merge_rows(self, image_id: str, rows: list[dict[str, Any]]) -> Record:
        lists = {
            name: list(dict.fromkeys(text for row in rows for text in row["meta"].pop(name, ())))
            for name in LISTS
        }
        wrong = {same_caption(mend(text)) for text in lists["not_captions"]}
        if "marked-wrong" in self.rules.allow:
            wrong = set()
        captions: dict[str, str] = {}
        for row in rows:
            for caption in row["captions"]:
                key = same_caption(caption)
                reason = "marked-wrong" if key in wrong else "repeated" if key in captions else None
                if reason:
                    self._reject("caption", row, row["row"], reason, caption, row["name"])
                else:
                    captions[key] = caption
        label = None
        for row in rows:
            label = label or row["label"]
            if row["label"] and row["label"] != label:
                detail = f"{row['label']}; it has the label {label} already"
                self._reject("label", row, row["row"], "other-label", detail, row["name"])
        meta: dict[str, Any] = {}
        for row in reversed(rows):  # the first row wins
            meta |= row["meta"]
        first = rows[0]
        return {
            "image_id": image_id,
            "captions": list(captions.values()),
            **({"label": label} if label else {}),
            **{name: texts for name, texts in lists.items() if texts},
            **{key: first[key] for key in ("width", "height")},
            "source": f"{Path(first['path']).name}, {first['row']}",
            "meta": meta,
            **{key: first[key] for key in ("file", "path", "row", "name")},
        }

    def split(self, fractions: Fractions, seed: int) -> list[str | None]:
        """Return a split for each picture; None for a near-duplicate that is dropped."""
        count = len(self._numbers)
        self._report("comparing", 0, None)
        looks = np.frombuffer(bytes(self._looks), np.uint8).reshape(count, HASH_BYTES)
        if self.rules.near == "ignore":
            groups = np.arange(count)
        else:
            groups = groups_of(count, near_pairs(looks, self.rules.radius))
        self.counts["groups"] = int((np.bincount(groups) > 1).sum())
        ids = list(self._numbers)
        splits: list[str | None] = list(
            assign(ids, self._official, groups, self._labels, fractions=fractions, seed=seed)
        )
        ranks = np.array([_RANK[split] for split in splits], np.int64)
        first, last = np.full(count, len(_RANK)), np.zeros(count, np.int64)
        np.minimum.at(first, groups, ranks)
        np.maximum.at(last, groups, ranks)
        if self.rules.near != "drop":
            self.counts["parted"] = int((first < last).sum())
        else:
            for number in np.flatnonzero(~self._one_of_each(groups)):
                splits[number] = None
        return splits

    def _one_of_each(self, groups: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return bool (N,): one picture of each group, the first with the last official split."""
        rank = np.array([-_RANK[split] for split in self._official])
        order = np.lexsort((np.arange(len(groups)), rank, groups))
        chosen = np.zeros(len(groups), np.bool_)
        chosen[order[np.unique(groups[order], return_index=True)[1]]] = True
        return chosen

    # ---- the second pass

    def write(
        self, writer: FolderWriter | ShardWriter, splits: list[str | None], pool: Path
    ) -> None:
        """Write every picture that stays. Raises DatasetError if there is none."""
        self._merged.seek(0)
        labelled = any(self._labels)
        keeping = self.rules.uncaptioned == "keep"
        most = self.rules.max_repeats or len(splits)
        for number, (line, split) in enumerate(zip(self._merged, splits, strict=True), 1):
            record = json.loads(line)
            origin = {key: record.pop(key) for key in ("file", "path", "row", "name")}
            where = (origin, origin["row"])
            captions = []
            for caption in record["captions"]:
                pictures = self._repeats[hash(same_caption(caption))]
                if pictures > most:
                    detail = f"on {pictures:,} pictures: {caption}"
                    self._reject("caption", *where, "repeated-on-many", detail, origin["name"])
                else:
                    captions.append(caption)
            record["captions"] = captions
            if split is None:
                detail = "looks like another picture, which stays"
                self._reject("picture", *where, "near-duplicate", detail, origin["name"])
            elif not captions and not keeping:
                detail = "none of its captions is left"
                self._reject("picture", *where, "no-caption", detail, origin["name"])
            else:
                if labelled:
                    record.setdefault("label", "")
                writer.add(split, record, pool / origin["file"])
                self.written[split] += 1
                self.counts["captions"] += len(captions)
                self.counts["uncaptioned"] += not captions
                self.labels.update([record["label"]] if record.get("label") else ())
                self.fingerprint ^= _print(split, record)
            self._report("writing", number, len(splits))
        if not self.written:
            reasons = Counter(
                {f"{what} {why}": n for what, of in self.rejected.items() for why, n in of.items()}
            )
            counts = ", ".join(f"{why} {n:,}" for why, n in reasons.most_common(5))
            left = "no picture" if keeping else "no picture with a caption"
            remedy = "loosen the rule that rejects most"
            if not keeping:
                remedy += (
                    ", or keep pictures without captions: clipkit data build --uncaptioned keep"
                )
            raise DatasetError(f"{left} is left of {len(splits):,}; rejected: {counts}; {remedy}")

    # ---- rejections and progress

    def _reject(
        self,
        what: str,
        source: Source | Mapping[str, Any],
        place: str,
        reason: str,
        detail: str,
        picture: str | None = None,
    ) -> None:
        self.rejected.setdefault(what, Counter())[reason] += 1
        path = source.path if isinstance(source, Source) else source["path"]
        line: Record = {"source": path, "row": place, "what": what, "reason": reason}
        line |= {"detail": detail} | ({"picture": picture} if picture else {})
        self._list.write(_readable(line) + "\n")

    def _report(
        self, phase: Literal["reading", "comparing", "writing"], done: int, total: int | None
    ) -> None:
        rejected = sum(sum(reasons.values()) for reasons in self.rejected.values())
        self.on_progress(Progress(phase, done, total, rejected))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"


def _readable(record: Mapping[str, Any]) -> str:
    """Return JSON with letters as they are, and "?" for those of names that are not UTF-8."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()


def _print(split: str, record: Record) -> int:
    """Return 128 bits of split, identity, captions and label, to be joined by xor in any order."""
    content = [split, record["image_id"], record["captions"]]
    content += [record["label"]] if record.get("label") else []
    text = json.dumps(content).encode()
    return int.from_bytes(blake2b(text, digest_size=16).digest(), "big")


# ---- the dataset's files


class FolderWriter:
    """Move pictures into an imagefolder below `folder`, with the list columns `lists` on every line."""

    def __init__(self, folder: Path, lists: Sequence[str]) -> None:
        self._folder = folder
        self._lists = tuple(lists)
        self._files: dict[str, TextIO] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def add(self, split: str, record: Record, picture: Path) -> None:
        first = split not in self._files
        if first:
            (self._folder / split).mkdir()
            self._files[split] = (self._folder / split / METADATA).open("w", encoding="utf-8")
        os.rename(picture, self._folder / split / picture.name)
        line: Record = {"file_name": picture.name}
        line["image_id"] = record["image_id"]
        line["captions"] = _typed(record["captions"]) if first else record["captions"]
        line |= {"label": record["label"]} if "label" in record else {}
        for name in self._lists:
            line[name] = _typed(record.get(name, [])) if first else record.get(name, [])
        line |= {key: record[key] for key in ("width", "height", "source")}
        line["meta"] = _readable(record["meta"])
        self._files[split].write(_readable(line) + "\n")


def _typed(texts: list[str]) -> list[str]:
    """Append an empty string if Arrow could not infer the type text: an empty list has no type, and a
    list of dates would become dates."""
    return texts if any(c.isalpha() for text in texts for c in text) else [*texts, ""]


class ShardWriter:
    """Write SPLIT/00000.tar, ..., as img2dataset does; .txt holds the first caption, .json all."""

    def __init__(self, folder: Path, *, size: int = 10_000) -> None:
        self._folder = folder
        self._size = size  # pictures a shard; the key has room for 10,000
        self._counts: dict[str, int] = {}
        self._tars: dict[str, tarfile.TarFile] = {}

    def close(self) -> None:
        for tar in self._tars.values():
            tar.close()

    def add(self, split: str, record: Record, picture: Path) -> None:
        shard, place = divmod(self._counts.get(split, 0), self._size)
        self._counts[split] = self._counts.get(split, 0) + 1
        if place == 0:
            (self._folder / split).mkdir(exist_ok=True)
            if split in self._tars:
                self._tars[split].close()
            self._tars[split] = tarfile.open(self._folder / split / f"{shard:05d}.tar", "w")  # noqa: SIM115
        key = f"{shard:05d}{place:04d}"
        first = record["captions"][:1]
        fields: Mapping[str, Any] = {
            "key": key,
            **({"caption": first[0]} if first else {}),
            **{name: value for name, value in record.items() if name != "meta"},
            "split": split,
            "meta": record["meta"],
        }
        text = _readable(fields)
        for suffix, body in (
            ("jpg", picture.read_bytes()),
            *(("txt", caption.encode()) for caption in first),
            ("json", text.encode()),
        ):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(body)
            self._tars[split].addfile(member, io.BytesIO(body))
        picture.unlink()
