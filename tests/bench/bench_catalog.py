"""Time the catalog's calls at any size, in the present version and in another worktree of the project.

    python tests/bench/bench_catalog.py INDEX  # this version
    python tests/bench/bench_catalog.py INDEX --against TREE OLD_INDEX  # and that one on its own

An index of a million pictures comes from tests/bench/bench_million.py; this version migrates an older
one, so give it a copy. `cold` is the first call of a process, `warm` the median of further calls with
other values, so that no answer is kept from before. Times are the
process's CPU time in milliseconds, which other work on the machine does not move much.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DATES = [f"{year}-{month:02d}" for year in (2012, 2014, 2016, 2018) for month in (1, 6)]
WORDS = ["family", "birthday", "italy", "photos", "img", "dog", "beach", "2019", "red"]


def operations(catalog: Any, filters: Any) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """Yield each operation with calls of it that have different arguments."""

    def match(**fields: Any) -> Callable[[], Any]:
        return lambda: catalog.matching(filters(**fields))

    cameras = [name for name, _ in catalog.facets().cameras[:8]]
    folders = [folder for folder, _ in catalog.folders(400)[20::40]]
    roots = list(catalog.roots())
    yield "after:", [match(after=date) for date in DATES]
    yield "before:", [match(before=date) for date in DATES]
    yield "camera:", [match(cameras=(name,)) for name in cameras]
    yield "format:", [match(formats=(name,)) for name in ("jpeg", "png", "webp", "tiff")]
    yield "width:", [match(min_width=width) for width in (1000, 2000, 3000, 4000, 5000)]
    yield "is:portrait", [match(orientation=o) for o in ("portrait", "landscape", "square")]
    yield "folder: by name", [match(folders=(n,)) for n in ("Family", "2019", "2016", "Pictures")]
    yield "folder: a root", [match(folders=(root,)) for root in roots]
    yield "folder: absolute", [match(folders=(folder,)) for folder in folders]
    yield "path: few", [match(paths=(p,)) for p in ("birthday 7", "italy 12", "img_77", "dsc0123")]
    yield "path: a half", [match(paths=(p,)) for p in ("img", "img_", "mg_1", "g_")]
    yield "path: all", [match(paths=(p,)) for p in ("jpg", "/", "a", "o")]
    yield "tag:", [match(tags=(tag,)) for tag, _ in catalog.facets().tags[:6]]
    yield (
        "five at once",
        [match(after=date, formats=("jpeg",), min_width=1000, folders=("srv",)) for date in DATES],
    )
    yield (
        "phrase: few",
        [lambda w=w: catalog.phrase(w) for w in ("birthday 7", "red car", "two dogs")],
    )
    yield "phrase: 30 %", [lambda w=w: catalog.phrase(w) for w in ("family", "birthday", "2019")]
    yield (
        "phrase: most",
        [lambda w=w: catalog.phrase(w) for w in ("photos", "srv", "img", "photos 2019")],
    )
    yield "having: 9 words", [lambda: catalog.having([{word, word + "s"} for word in WORDS])] * 6
    if hasattr(catalog, "newest"):
        yield "list by date", [lambda: catalog.newest(100)] * 5
    else:
        some = catalog.matching(filters(before="2011"))
        dense = catalog.matching(filters(min_width=4000))
        for sort in ("date", "name"):
            yield f"list by {sort}", [lambda s=sort: catalog.listed(s, limit=100)] * 5
            deep = catalog.listed(sort, limit=10_000)[1]
            yield (
                f"list by {sort}, page 100",
                [lambda s=sort, d=deep: catalog.listed(s, after=d, limit=100)] * 5,
            )
            for name, among in (("the oldest", some), ("the wide", dense)):
                yield (
                    f"list by {sort} among {len(among):,}, {name}",
                    [lambda s=sort, a=among: catalog.listed(s, among=a, limit=100)] * 5,
                )
    encoder = catalog.active_encoder().encoder_id
    yield "live_nums", [lambda: catalog.live_nums(encoder)] * 5
    yield "stats", [lambda: catalog.stats(encoder)] * 5
    yield "folders", [lambda: catalog.folders()] * 5
    yield "facets", [lambda: catalog.facets()] * 5
    yield "places_below", [lambda r=root: catalog.places_below(r) for root in roots]
    yield "known_files", [lambda: sum(1 for _ in known(catalog, roots[0], encoder))] * 2


def known(catalog: Any, root: str, encoder: str) -> Any:
    return catalog.known_files(root, encoder_id=encoder)


def measure(index: str) -> None:
    """Print a JSON object of (cold, warm) by operation; each operation in a process of its own."""
    from clipkit.catalog import Catalog, Filters

    with Catalog.open(index) as catalog:
        names = [name for name, _ in operations(catalog, Filters)]
    times: dict[str, tuple[float, float]] = {}
    for name in names:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            with Catalog.open(index) as catalog:
                calls = next(calls for n, calls in operations(catalog, Filters) if n == name)
            with Catalog.open(index) as fresh:  # nothing in memory
                catalog.__dict__.update(fresh.__dict__)
                taken = []
                for call in calls:
                    start = time.process_time()
                    call()
                    taken.append(1000 * (time.process_time() - start))
            os.write(writer, json.dumps((taken[0], statistics.median(taken[1:]))).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            times[name] = tuple(json.loads(answer.read()))
        os.waitpid(child, 0)
        print(name, times[name], file=sys.stderr)
    print(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("index")
    parser.add_argument("--against", nargs=2, metavar=("TREE", "OLD_INDEX"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.index)
        return

    def run(tree: Path | str, index: str) -> dict[str, list[float]]:
        command = [sys.executable, __file__, index, "--measure"]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        times: dict[str, list[float]] = json.loads(done.stdout)
        return times

    before = run(*options.against) if options.against else {}
    now = run(ROOT, options.index)
    print(
        f"{'':40}{'before':>22}{'now':>22}\n{'':40}{'cold':>11}{'warm':>11}{'cold':>11}{'warm':>11}"
    )
    for name in {**before, **now}:
        cells = [*before.get(name, ["", ""]), *now.get(name, ["", ""])]
        print(f"{name:40}" + "".join(f"{c:11.1f}" if c != "" else f"{'':11}" for c in cells))


if __name__ == "__main__":
    main()
