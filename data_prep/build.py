"""Sources in, a data set out: read, clean, compare, split, write, in two passes over disk.

    sources ── load (threads): decode, hash, link ──▶ spool + pool of pictures     (aside)
    spool ── merge a picture's rows ── look-alikes ── splits ──▶ train/ validation/ test/   (renamed)

What stays in memory is about 1 kB a picture: identity, perceptual hash, where its rows lie, hashes of
its captions; never pictures nor captions themselves. All is written into a hidden folder beside the
goal, which is renamed when its last file, dataset.json, is there. Interrupted, it is removed; killed,
the next run removes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DatasetError
from clipkit.images import Limits
from clipkit.records import SPLITS
from clipkit.sources import Broken, RawPair, Source
from clipkit.sources.rows import LISTS
from data_prep.clean import Rules, caption_fault, mend, same_caption
from data_prep.load import Fault, Loaded, Loader, in_order
from data_prep.split import HASH_BYTES, Fractions, assign, groups_of, near_pairs
from data_prep.staging import MANIFEST, Built, Progress, aside, check_out, swap, write_manifest
from data_prep.writers import FolderWriter, Record, ShardWriter, Writer

REJECTED = "rejected.jsonl"
_SPOOL, _MERGED = "spool.jsonl", "merged.jsonl"
# Of a picture's official splits the last counts: what is tested on must not be trained on.
_RANK = {split: rank for rank, split in enumerate((None, *SPLITS))}


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
    """Builds the data set folder `out` from all sources together; what it wrote.

    Pictures are hard links where the disk can (copies else), `resize` encodes larger ones anew;
    `shards` writes WebDataset tars in place of an imagefolder. Equal files are one picture with all
    their captions. What is rejected is listed in rejected.jsonl.

    InputError: `out` is there and `overwrite` is not, or is no data set; a source yields nothing, or
    nothing is left of it. An exception, KeyboardInterrupt too, leaves `out` as it was.
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
            writer: Writer = ShardWriter(folder) if shards else FolderWriter(folder, lists=lists)
            with writer:
                run.write(writer, splits, pool)
        shutil.rmtree(pool)
        for name in (_SPOOL, _MERGED):
            (folder / name).unlink()
        built = Built(
            out,
            run.rows,
            {split: run.written[split] for split in SPLITS if run.written[split]},
            run.counts["captions"],
            run.counts["mended"],
            run.counts["groups"],
            run.counts["parted"],
            {what: dict(reasons.most_common()) for what, reasons in run.rejected.items()},
            f"{run.fingerprint:032x}",
        )
        options = {
            "rules": asdict(rules) | {"allow": sorted(rules.allow)},
            "fractions": asdict(fractions),
            **{"seed": seed, "resize": resize, "shards": shards},
        }
        write_manifest(folder / MANIFEST, built, sources, options=options, command=command)
        swap(folder, out)
    return built


class _Build:
    """The state of one build; `read` each source, then `merge`, `split`, `write`."""

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
        self.written: Counter[str] = Counter()
        self.rejected: dict[str, Counter[str]] = {}
        self.fingerprint = 0
        self._spool = stack.enter_context((folder / _SPOOL).open("w+b"))
        self._merged = stack.enter_context((folder / _MERGED).open("w+b"))
        self._list = stack.enter_context((folder / REJECTED).open("w", encoding="utf-8"))
        self._numbers: dict[str, int] = {}  # image_id -> the picture's number, from 0
        self._places: list[list[int]] = []  # where its rows begin in the spool
        self._looks = bytearray()
        self._official: list[str | None] = []
        self._met: dict[str, int | Fault | None] = {}  # path -> what came of it; None: under way
        self._repeats: Counter[int] = Counter()  # hash of a caption -> pictures that have it

    # ---- the first pass

    def read(self, source: Source, workers: int) -> None:
        """Loads what a source yields in threads, and spools it in the source's order."""
        first: Broken | None = None
        done, spooled = 0, self._spool.tell()
        for done, (item, future) in enumerate(in_order(source.rows(), self._start, workers), 1):
            if isinstance(item, Broken):
                first = first or item
                self._reject("row", source, item.row, item.reason, item.detail)
            else:
                self._take(source, item, future)
            self._tell("reading", done, source.total)
        self.rows += done
        if self._spool.tell() == spooled:
            why = "it has no rows" if not done else f"none of its {done:,} rows gives a picture"
            if first:
                why += f"; the first: {first.row}: {first.detail}"
            if first and first.reason == "missing":
                why += "; say where the pictures lie with --pictures"
            raise DatasetError(f"nothing could be read from {source.path}: {why}")

    def _start(
        self, pool: ThreadPoolExecutor, item: RawPair | Broken
    ) -> Future[Loaded | Fault] | None:
        """The picture's loading; None for a broken row and for a file that was met before."""
        if isinstance(item, Broken):
            return None
        if isinstance(item.picture, Path):
            path = os.path.abspath(item.picture)
            if path in self._met:
                return None
            self._met[path] = None
        return pool.submit(self.loader, item.picture)

    def _take(self, source: Source, pair: RawPair, future: Future[Loaded | Fault] | None) -> None:
        """A row whose picture is loaded: into the spool, or rejected."""
        row: dict[str, Any] = {"name": pair.name, "path": source.path, "row": pair.row}
        path = os.path.abspath(pair.picture) if isinstance(pair.picture, Path) else None
        if future is None:
            assert path is not None
            found = self._met[path]
        else:
            loaded = future.result()
            found = loaded if isinstance(loaded, Fault) else self._number(loaded)
            if isinstance(loaded, Loaded) and found == len(self._places):
                self._places.append([])
                self._official.append(None)
                self._looks += loaded.look
                row |= {"file": loaded.file, "width": loaded.width, "height": loaded.height}
            elif isinstance(loaded, Loaded) and isinstance(found, int):
                detail = f"the same file as {loaded.image_id}, which has its captions now"
                if pair.split and (known := self._official[found]) not in (None, pair.split):
                    detail += f"; said to be of {known} and of {pair.split}: the latter of them"
                self._reject("picture", source, pair.row, "duplicate", detail, pair.name)
            if path is not None:
                self._met[path] = found
        if not isinstance(found, int):
            assert found is not None
            self._reject("picture", source, pair.row, found.reason, found.detail, pair.name)
            return
        self._official[found] = max(self._official[found], pair.split, key=_RANK.__getitem__)
        row |= {"captions": self._clean(source, pair), "meta": dict(pair.meta)}
        self._places[found].append(self._spool.tell())
        self._spool.write(_line(row))

    def _number(self, loaded: Loaded) -> int:
        return self._numbers.setdefault(loaded.image_id, len(self._numbers))

    def _clean(self, source: Source, pair: RawPair) -> list[str]:
        kept = []
        for said in pair.captions:
            caption = mend(said)
            if reason := caption_fault(caption, self.rules):
                self._reject("caption", source, pair.row, reason, said, pair.name)
            else:
                kept.append(caption)
                self.counts["mended"] += caption != said
        return kept

    # ---- between: a picture's rows together, look-alikes, splits

    def merge(self) -> list[str]:
        """Each picture's rows become one line; the list columns that any of them has."""
        found: set[str] = set()
        self._spool.flush()
        for image_id, number in self._numbers.items():
            rows = []
            for place in self._places[number]:
                self._spool.seek(place)
                rows.append(json.loads(self._spool.readline()))
            self._places[number] = []
            record = self._merge_rows(image_id, rows)
            found |= {name for name in LISTS if record.get(name)}
            self._repeats.update(hash(same_caption(c)) for c in record["captions"])
            self._merged.write(_line(record))
        return [name for name in LISTS if name in found]

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
        meta: dict[str, Any] = {}
        for row in reversed(rows):  # the first row's word counts
            meta |= row["meta"]
        first = rows[0]
        return {
            "image_id": image_id,
            "captions": list(captions.values()),
            **{name: texts for name, texts in lists.items() if texts},
            **{key: first[key] for key in ("width", "height")},
            "source": f"{Path(first['path']).name}, {first['row']}",
            "meta": meta,
            **{key: first[key] for key in ("file", "path", "row", "name")},
        }

    def split(self, fractions: Fractions, seed: int) -> list[str | None]:
        """A split for each picture; None for a near-duplicate that is dropped."""
        count = len(self._numbers)
        self._tell("comparing", 0, None)
        looks = np.frombuffer(bytes(self._looks), np.uint8).reshape(count, HASH_BYTES)
        if self.rules.near == "ignore":
            groups = np.arange(count)
        else:
            groups = groups_of(count, near_pairs(looks, self.rules.radius))
        self.counts["groups"] = int((np.bincount(groups) > 1).sum())
        ids = list(self._numbers)
        splits: list[str | None] = list(
            assign(ids, self._official, groups, fractions=fractions, seed=seed)
        )
        ranks = np.array([_RANK[split] for split in splits], np.int64)
        first, last = np.full(count, len(_RANK)), np.zeros(count, np.int64)
        np.minimum.at(first, groups, ranks)
        np.maximum.at(last, groups, ranks)
        if self.rules.near != "drop":
            self.counts["parted"] = int((first < last).sum())
        else:
            for number in np.flatnonzero(~self._kept(groups)):
                splits[number] = None
        return splits

    def _kept(self, groups: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool (N,): one picture of each group, the first of those whose official split is last."""
        rank = np.array([-_RANK[split] for split in self._official])
        order = np.lexsort((np.arange(len(groups)), rank, groups))
        kept = np.zeros(len(groups), np.bool_)
        kept[order[np.unique(groups[order], return_index=True)[1]]] = True
        return kept

    # ---- the second pass

    def write(self, writer: Writer, splits: list[str | None], pool: Path) -> None:
        """Every picture that still has a caption, to its split. DatasetError if none has."""
        self._merged.seek(0)
        most = self.rules.max_repeats or len(splits)
        for number, (line, split) in enumerate(zip(self._merged, splits, strict=True), 1):
            record = json.loads(line)
            place = {key: record.pop(key) for key in ("file", "path", "row", "name")}
            told = (place, place["row"])
            captions = []
            for caption in record["captions"]:
                pictures = self._repeats[hash(same_caption(caption))]
                if pictures > most:
                    detail = f"on {pictures:,} pictures: {caption}"
                    self._reject("caption", *told, "repeated-on-many", detail, place["name"])
                else:
                    captions.append(caption)
            record["captions"] = captions
            if split is None:
                detail = "looks like a picture that is kept"
                self._reject("picture", *told, "near-duplicate", detail, place["name"])
            elif not captions:
                detail = "nothing that was said of it is left"
                self._reject("picture", *told, "no-caption", detail, place["name"])
            else:
                writer.add(split, record, pool / place["file"])
                self.written[split] += 1
                self.counts["captions"] += len(captions)
                self.fingerprint ^= _print(split, record)
            self._tell("writing", number, len(splits))
        if not self.written:
            reasons = Counter(
                {f"{what} {why}": n for what, of in self.rejected.items() for why, n in of.items()}
            )
            told_of = ", ".join(f"{why} {n:,}" for why, n in reasons.most_common(5))
            raise DatasetError(
                f"no picture with a caption is left of {len(splits):,}; rejected: {told_of}; "
                "loosen the rule that took the most"
            )

    # ---- what all parts tell

    def _reject(
        self,
        what: str,
        source: Source | Mapping[str, Any],
        row: str,
        reason: str,
        detail: str,
        picture: str | None = None,
    ) -> None:
        self.rejected.setdefault(what, Counter())[reason] += 1
        path = source.path if isinstance(source, Source) else source["path"]
        line: Record = {"source": path, "row": row, "what": what, "reason": reason}
        line |= {"detail": detail} | ({"picture": picture} if picture else {})
        self._list.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _tell(
        self, phase: Literal["reading", "comparing", "writing"], done: int, total: int | None
    ) -> None:
        rejected = sum(sum(reasons.values()) for reasons in self.rejected.values())
        self.on_progress(Progress(phase, done, total, rejected))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"


def _print(split: str, record: Record) -> int:
    """128 bits of what a trainer sees of a picture; xor of all does not depend on their order."""
    seen = json.dumps([split, record["image_id"], record["captions"]]).encode()
    return int.from_bytes(blake2b(seen, digest_size=16).digest(), "big")
