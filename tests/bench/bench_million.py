"""Search in a million synthetic pictures, here and in an older checkout, beside a plain IndexFlatIP.

    python tests/bench/bench_million.py make /tmp/million/base --pictures 1000000
    git worktree add /tmp/old fad32f4
    python tests/bench/bench_million.py measure /tmp/million/base --against /tmp/old

`make` writes an index (see synthetic_library.py). `measure` copies it for each checkout, since opening
migrates it, and measures every row in a process of its own, with one thread, in turns, on public
interfaces only: clipkit.Library, Catalog, refresh_snapshot and the command line. Every query is asked
once, so nothing is answered from a cache of results. Peaks are of that process's resident memory
(VmHWM; mapped files count). A case ends early after LIMIT_S seconds (40, or what that variable says), or
after three times that if it has not run three times. With --only, some measures: for five million
pictures `--only commands,words,filters,similar,recall,flat`.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from clipkit import Library
    from clipkit.catalog import Catalog

ROOT = Path(__file__).parents[2]
DATA = Path("/work/shared/data")
CACHE = Path("/tmp/bench-tmp")
LIMIT_S = float(os.environ.get("LIMIT_S", "40"))
K = 24
COMMIT_EVERY_S = 2.0
STOP = frozenset("a an the of in on at with and is are to his her its it by from for up".split())
SAMPLES = ("dog", "beach", "child", "snow", "red", "running", "man", "water", "street", "grass")
FILTERS = (
    "after:2024", "after:2011", "camera:canon", 'camera:"nikon d9"', "folder:archive",
    'folder:"Family"', "path:birthday", "path:img_", "path:jpg", "tag:beach", "width:5000 format:png",
)  # fmt: skip
LISTINGS = ("sort:date", "after:2015 sort:date", "camera:canon", "sort:name")
PHRASES = ('"dog"', '"birthday"', '"srv"')  # in the texts of few, of more, of most pictures
LATEST = Path("worker.json")

Rows = dict[str, list[float]]  # "case [unit]": values


# ---- the measures, each run in a process of its own with PYTHONPATH set to a checkout


def commands(folder: Path) -> Rows:
    """Time whole commands in a cold process. (In the small process of `measure` itself.)"""
    rows: Rows = {}
    for case, arguments in (("search WORDS", None), ("status", ["status"])):
        for words in itertools.islice(queries(), 10 if arguments is None else 3):
            command = [sys.executable, "-m", "app.cli", *(arguments or ["search", words])]
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--index", str(folder)],
                stdout=subprocess.PIPE,
                cwd=folder.parent,  # `-m` looks in the current folder first, which may be a checkout
            )
            assert process.stdout is not None
            process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise RuntimeError(f"{command} failed")
            rows.setdefault(f"{case} [s]", []).append(time.perf_counter() - began)
            rows.setdefault(f"{case} [peak MB]", []).append(usage.ru_maxrss / 1024)
    return rows


def opening(folder: Path) -> Rows:
    """Open for writing, which migrates an older index."""
    from clipkit.catalog import Catalog

    began = time.perf_counter()
    Catalog.open(folder, write=True).close()
    return {"open or migrate [s]": [time.perf_counter() - began]}


def snapshot(folder: Path) -> Rows:
    from clipkit.catalog import Catalog
    from clipkit.index import refresh_snapshot

    with Catalog.open(folder, write=True) as catalog:
        encoder = catalog.active_encoder()
        assert encoder is not None
        began = time.perf_counter()
        refresh_snapshot(catalog, encoder.encoder_id, force=True)
        return {"build [s]": [time.perf_counter() - began]}


def words(folder: Path) -> Rows:
    with opened(folder) as library:
        rows = {"open and first search [ms]": timed(lambda: library.search("a car", k=K), 1)}
        source = queries()
        rows["words to hits [ms]"] = timed(lambda: library.search(next(source), k=K), 100)
        rows["memory after it [MB]"] = [memory_mb("VmRSS")]
        rows["memory after it, not of files [MB]"] = [memory_mb("RssAnon")]
    return rows


def filters(folder: Path) -> Rows:
    rows: Rows = {}
    with opened(folder) as library:
        library.search("a car", k=K)
        source = queries()
        for case in FILTERS:
            share = library.search(case, k=1).total / len(library)
            rows[f"words {case} ({share:.1%}) [ms]"] = timed(
                lambda case=case: library.search(f"{next(source)} {case}", k=K), 15
            )
    return rows


def listings(folder: Path) -> Rows:
    rows: Rows = {}
    with opened(folder) as library:
        library.search("a car", k=K)
        source = queries()
        rows["words sort:date [ms]"] = timed(
            lambda: library.search(f"{next(source)} sort:date", k=K), 30
        )
        for case in LISTINGS:
            rows[f"{case} [ms]"] = timed(lambda case=case: library.search(case, k=K), 15)
    return rows


def similar(folder: Path) -> Rows:
    with opened(folder) as library:
        hits = iter(
            [hit for text in itertools.islice(queries(), 10) for hit in library.search(text)]
        )
        return {"similar [ms]": timed(lambda: library.similar(next(hits), k=K), 60)}


def phrases(folder: Path) -> Rows:
    rows: Rows = {}
    with opened(folder) as library:
        library.search("a car", k=K)
        source = queries()
        for case in PHRASES:
            share = library.search(case, k=1).total / len(library)
            rows[f"{case} ({share:.1%}) words [ms]"] = timed(
                lambda case=case: library.search(f"{case} {next(source)}", k=K), 15
            )
    return rows


def paging(folder: Path) -> Rows:
    """Go to result 10,000 in pages of 500: by cursor, or by a growing k where there is none."""
    pages: list[float] = []
    with opened(folder) as library:
        library.search("a car", k=K)
        by_cursor = "cursor" in inspect.signature(library.search).parameters
        cursor, seen = None, 0
        while seen < 10_000:
            began = time.perf_counter()
            if by_cursor:
                hits = library.search("a dog on grass", k=500, cursor=cursor)  # type: ignore[call-arg]
                cursor = hits.cursor  # type: ignore[attr-defined]
                seen += len(hits)
            else:
                seen = len(library.search("a dog on grass", k=seen + 500))
            pages.append(1000 * (time.perf_counter() - began))
    return {"page of 500 [ms]": pages, "last page [ms]": pages[-1:], "all 20 [ms]": [sum(pages)]}


def after_commit(folder: Path) -> Rows:
    """Commit 500 new pictures and search at once; fails if one of them is not found."""
    times = []
    with opened(folder) as library, opened_to_write(folder) as catalog:
        library.search("a car", k=K)
        source, more = queries(), added(catalog, 500)
        for _ in range(10):
            image_id = next(more)
            times += timed(lambda: library.search(next(source), k=K), 1)
            library.similar(image_id, k=1)
    return {"search right after it [ms]": times}


def during_commits(folder: Path) -> Rows:
    """Search for 30 s while another process commits 64 pictures every COMMIT_EVERY_S seconds."""
    writer = subprocess.Popen([sys.executable, __file__, "commit", str(folder)])
    try:
        with opened(folder) as library:
            library.search("a car", k=K)
            before, began, times = len(library), time.monotonic(), []
            for text in itertools.cycle(list(itertools.islice(queries(), 2_000))):
                times += timed(lambda text=text: library.search(text, k=K), 1)
                time.sleep(0.05)
                if time.monotonic() - began > 30:
                    break
            if len(library) == before or writer.poll() is not None:
                raise RuntimeError("nothing was committed meanwhile")
    finally:
        writer.terminate()
        writer.wait()
    return {"search [ms]": times, "slowest [ms]": [max(times)]}


def commit(folder: Path) -> Rows:
    with opened_to_write(folder) as catalog:
        for _ in added(catalog, 64):
            time.sleep(COMMIT_EVERY_S)
    return {}


def known_files(folder: Path) -> Rows:
    """Go through every file that the index knows, as an index run with nothing new does."""
    from clipkit.catalog import Catalog

    with Catalog.open(folder) as catalog:
        encoder = catalog.active_encoder()
        assert encoder is not None
        began, count = time.perf_counter(), 0
        for root in catalog.roots():
            known: Any = catalog.known_files(root, encoder_id=encoder.encoder_id)
            count += sum(1 for _ in known)
        if count < catalog.stats().pictures:
            raise RuntimeError(f"only {count:,} known files")
        return {"all known files [s]": [time.perf_counter() - began]}


def recall(folder: Path) -> Rows:
    """Recall@10 of the snapshot on 300 captions, against exact search in the catalog's vectors."""
    import numpy as np

    from clipkit.catalog import Catalog
    from clipkit.index import load_snapshot

    with Catalog.open(folder) as catalog:
        encoder = catalog.active_encoder()
        assert encoder is not None
        loaded: Any = load_snapshot(
            catalog, encoder.encoder_id, catalog.snapshot(encoder.encoder_id)
        )
        if loaded is None:
            raise RuntimeError("there is no snapshot")
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        vectors = query_vectors(captions()[:300])
        least = np.full((len(vectors), 10), -1.0, np.float32)
        for _, rows in stored(catalog, encoder.encoder_id):
            scores = vectors @ rows.astype(np.float32).T
            least = np.partition(np.concatenate([least, scores], 1), -10)[:, -10:]
        shares = []
        for vector, tenth in zip(vectors, least.min(1), strict=True):
            nums, _ = index.search(vector[None], 10)[0]
            own = [catalog.vector(int(num), encoder.encoder_id) for num in nums]
            # 1e-4: what half precision may move a cosine by
            shares.append(float(np.mean(np.stack(own).astype(np.float32) @ vector > tenth - 1e-4)))
    return {"recall@10, mean": [statistics.fmean(shares)], "recall@10, least": [min(shares)]}


def flat(folder: Path) -> Rows:
    """A plain IndexFlatIP of the same vectors: the search alone, without words, rows and filters."""
    import faiss
    import numpy as np

    from clipkit.catalog import Catalog

    faiss.omp_set_num_threads(1)
    with Catalog.open(folder) as catalog:
        encoder = catalog.active_encoder()
        assert encoder is not None
        began = time.perf_counter()
        index = faiss.IndexFlatIP(encoder.dim)
        for _, rows in stored(catalog, encoder.encoder_id):
            index.add(rows.astype(np.float32))
        seconds = time.perf_counter() - began
    vectors = iter(query_vectors(list(itertools.islice(queries(), 100))))
    times = timed(lambda: index.search(next(vectors)[None], K), 100)
    return {"IndexFlatIP, build [s]": [seconds], "IndexFlatIP, search alone [ms]": times}


MEASURES: dict[str, Callable[[Path], Rows]] = {
    one.__name__: one
    for one in (
        opening, snapshot, commands, words, filters, listings, similar, phrases, paging, known_files,
        recall, flat, during_commits, after_commit,
    )
}  # fmt: skip


# ---- what they share


def opened(folder: Path) -> Library:
    from clipkit import Library

    return Library.open(folder)


def opened_to_write(folder: Path) -> Catalog:
    from clipkit.catalog import Catalog

    return Catalog.open(folder, write=True)


def timed(action: Callable[[], object], times: int) -> list[float]:
    """Return milliseconds of up to `times` runs, fewer once LIMIT_S has passed."""
    began, found = time.monotonic(), list[float]()
    while len(found) < times and time.monotonic() - began < LIMIT_S * (3 if len(found) < 3 else 1):
        start = time.perf_counter()
        action()
        found.append(1000 * (time.perf_counter() - start))
    return found


def captions() -> list[str]:
    """Return captions of real photos in a random order; without the data, made of a few words."""
    file = DATA / "flickr8k" / "dev.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else ()
    texts = [caption for line in lines for caption in json.loads(line)["captions"]]
    texts = texts or [" ".join(three) for three in itertools.permutations(SAMPLES, 3)]
    random.Random(0).shuffle(texts)
    return texts


def queries() -> Iterator[str]:
    """Yield different queries of two to four words, none of which means anything to the parser."""
    asked = set()
    for caption in captions():
        some = [word for word in caption.lower().split() if word.isalpha() and word not in STOP]
        text = " ".join(some[: 2 + len(asked) % 3])
        if len(some) > 1 and text not in asked:
            asked.add(text)
            yield text


def query_vectors(texts: list[str]) -> np.ndarray:
    from clipkit.lazy_encoder import LazyEncoder

    return LazyEncoder("builtin").encode_texts(texts)


def stored(catalog: Catalog, encoder_id: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (nums, float16 vectors) of all live pictures in parts."""
    if hasattr(catalog, "vector_chunks"):
        for part in catalog.vector_chunks(encoder_id, rows=65_536):
            yield part.nums, part.vectors
    else:
        whole = catalog.vectors(encoder_id)
        for start in range(0, len(whole.nums), 65_536):
            part = slice(start, start + 65_536)
            yield whole.nums[part], whole.vectors[part]


def added(catalog: Catalog, count: int) -> Iterator[str]:
    """Commit `count` new pictures again and again; yield the image_id of one of them each time."""
    import numpy as np
    import synthetic_library as synthetic

    from clipkit.lazy_encoder import LazyEncoder

    real = synthetic.centres(DATA, CACHE, LazyEncoder("builtin"))
    recipe = synthetic.Recipe.of(real, pictures=10_000)
    encoder = catalog.active_encoder()
    assert encoder is not None
    seed = time.time_ns()  # never the pictures of an earlier call
    for first in itertools.count(0, count):
        of = np.arange(count) % len(recipe.folders)
        synthetic.add_batch(catalog, recipe, of, first, encoder.encoder_id, seed)
        catalog.commit()
        yield synthetic.image_id(seed, first)


def memory_mb(name: str) -> float:
    """Return a line of this process's status; 0 where the system does not tell it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{name}:")), 0.0)


# ---- the commands


def make(args: argparse.Namespace) -> None:
    import synthetic_library as synthetic

    from clipkit.lazy_encoder import LazyEncoder

    encoder = LazyEncoder("builtin")
    real = synthetic.centres(DATA, CACHE, encoder, seed=args.seed)
    recipe = synthetic.Recipe.of(
        real, pictures=args.pictures, captions=args.captions, seed=args.seed
    )
    found: dict[str, object] = {**synthetic.make(
        args.folder, pictures=args.pictures, recipe=recipe, encoder=encoder, seed=args.seed
    )}  # fmt: skip
    found["peak_mb"] = memory_mb("VmHWM")
    found["bytes"] = {
        str(path.relative_to(args.folder)): path.stat().st_size
        for path in sorted(args.folder.rglob("*"))
        if path.is_file()
    }
    print(json.dumps(found, indent=2))


def work(args: argparse.Namespace) -> None:
    rows = MEASURES[args.measure](args.folder)
    rows["peak [MB]"] = [memory_mb("VmHWM")]
    args.into.write_text(json.dumps(rows))


def measure(args: argparse.Namespace) -> None:
    checkouts = {"here": ROOT} | ({"before": args.against} if args.against else {})
    names = list(MEASURES) if args.only is None else args.only.split(",")
    args.scratch.mkdir(parents=True, exist_ok=True)
    copies = {}
    for name in checkouts:
        copies[name] = args.scratch / name
        shutil.rmtree(copies[name], ignore_errors=True)
        shutil.copytree(args.folder, copies[name])
        if (
            "opening" not in names
        ):  # an older index is migrated, and its snapshot made anew, all the same
            names = ["opening", "snapshot", *names]
    results: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in checkouts}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for one in names:
        for name, checkout in checkouts.items():
            if one == "flat" and name != "here":
                continue
            environment = {**os.environ, **one_thread, "PYTHONPATH": str(checkout)}
            into = args.scratch / LATEST
            into.unlink(missing_ok=True)
            if one == "commands":
                os.environ["PYTHONPATH"] = str(checkout)
                results[name][one] = commands(copies[name])
            else:
                command = [sys.executable, __file__, "work", one, str(copies[name]), str(into)]
                subprocess.run(command, check=False, env=environment, cwd=args.scratch)
                results[name][one] = json.loads(into.read_text()) if into.exists() else {}
            print(f"-- {one}, {name}", *lines(results[name][one]), sep="\n", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
    print("\n" + table(results))
    if not args.keep:
        for copy in copies.values():
            shutil.rmtree(copy)


def lines(rows: Rows) -> Iterator[str]:
    if not rows:
        yield "   FAILED"
    for case, values in rows.items():
        yield f"   {case}: {shown(values)}"


def shown(values: list[float] | None) -> str:
    """n, median and 95th percentile."""
    if not values:
        return "–"
    p95 = sorted(values)[math.ceil(0.95 * len(values)) - 1]
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 4 if middle <= 1 else 2
    if len(values) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} / {p95:,.{digits}f} ({len(values)})"


def table(results: dict[str, dict[str, Rows]]) -> str:
    """Return a Markdown table: median / p95 (n) of every case and checkout, and their ratio."""
    out = [f"| measure | {' | '.join(results)} | ratio |", "|---" * (len(results) + 2) + "|"]
    here = results["here"]
    for one, rows in here.items():
        cases = dict.fromkeys([*rows, *results.get("before", {}).get(one, {})])
        for case in cases:
            found = [results[name].get(one, {}).get(case) for name in results]
            middles = [statistics.median(values) for values in found if values]
            ratio = f"{middles[1] / middles[0]:.1f}" if len(middles) == 2 and middles[0] else ""
            out.append(f"| {one}: {case} | {' | '.join(map(shown, found))} | {ratio} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(required=True)
    command = subparsers.add_parser("make", help="make a synthetic index")
    command.add_argument("folder", type=Path)
    command.add_argument("--pictures", type=int, default=1_000_000)
    command.add_argument("--captions", type=float, default=0.1, help="share of pictures with one")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=make)
    command = subparsers.add_parser("measure", help="measure copies of an index")
    command.add_argument("folder", type=Path)
    command.add_argument("--against", type=Path, help="an older checkout, measured too")
    command.add_argument("--only", help=f"some of: {','.join(MEASURES)}")
    command.add_argument("--json", type=Path, help="a file for every value")
    command.add_argument("--scratch", type=Path, default=CACHE / "million")
    command.add_argument("--keep", action="store_true", help="keep the copies")
    command.set_defaults(run=measure)
    command = subparsers.add_parser("work", help="one measure; `measure` calls it")
    command.add_argument("measure", choices=MEASURES)
    command.add_argument("folder", type=Path)
    command.add_argument("into", type=Path)
    command.set_defaults(run=work)
    command = subparsers.add_parser("commit", help="commit pictures; `measure` calls it")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=lambda args: commit(args.folder))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
