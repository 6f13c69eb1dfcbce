"""What folder names add to a search, and what they cost where they mislead: before and after.

    python tests/bench/bench_folder_names.py --data /work/shared/data --work FOLDER

One library of 4,000 pictures in FOLDER, indexed with builtin: 1,000 photos of Flickr8k's development
split under numbers, CIFAR-10's classes as ten folders of 200, and 1,000 folders of one ImageNet photo
each ("golf_ball"). "Before" is NAME_WEIGHT 0, cosines alone. Captions are queries that folder names can
only mislead: most have a word that is a folder's name, and none of these folders holds their picture.
Intervals are 95 %, over the queries' pictures.

    python tests/bench/bench_folder_names.py --data /work/shared/data --work FOLDER --captioned 100000

What looking at names costs in a library of that many pictures, each with one caption of Flickr8k's
training split (captions repeat) and a random vector: milliseconds of a whole search, and of the words
in names within it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from clipkit.catalog import Catalog, Filters
from clipkit.embed import index_folders
from clipkit.lazy_encoder import LazyEncoder
from clipkit.query import parse
from clipkit.search import Searcher, name_matches

INFLECTED = {
    "airplanes": "airplane", "birds": "bird", "cats": "cat", "frogs": "frog", "horses": "horse",
    "ships": "ship", "trucks": "truck", "automobiles": "automobile",
}  # fmt: skip
SEVERAL = {
    "a small dog": "dog", "dogs running": "dog", "a white horse": "horse", "a yellow truck": "truck",
    "cats sleeping on a sofa": "cat", "a flying bird": "bird", "ships in a harbour": "ship",
    "a frog on a leaf": "frog", "a deer in the forest": "deer", "a big airplane": "airplane",
    "a red automobile": "automobile", "photos of a horse at home": "horse",
}  # fmt: skip
Measure = Callable[[], list[float]]


def copy(data: Path, pictures: Path) -> None:
    """Lay the library out; what is there stays."""
    for number, line in enumerate((data / "flickr8k/dev.jsonl").open()):
        _copy(data / "flickr8k" / json.loads(line)["image"], pictures / f"flickr/{number:04}.jpg")
    for source in sorted((data / "cifar10_sample").glob("*/*.jpg")):
        _copy(source, pictures / "cifar" / source.parent.name / source.name)
    for row in _lines(data / "imagenet_sample/classes.jsonl"):
        folder = row["names"][0].replace(" ", "_").replace("/", "_")
        source = data / "imagenet_sample" / row["image"]
        _copy(source, pictures / "things" / folder / f"image_{row['class']:04}.jpg")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy(source, target)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_folder(
    searcher: Searcher, queries: Mapping[str, str], filters: Filters | None
) -> list[float]:
    """Return for each query the share of the first 24 hits that lie in its folder."""
    return [
        float(np.mean([Path(h.picture.path).parent.name == folder for h in hits]))
        for query, folder in queries.items()
        if (hits := searcher.search(query, k=24, filters=filters).hits)
    ]


def recall(
    searcher: Searcher, queries: list[tuple[str, str]], k: int, filters: Filters | None = None
) -> list[float]:
    """Return for each (query, end of a path) whether that picture is among the first k."""
    return [
        float(
            any(
                h.picture.path.endswith(end)
                for h in searcher.search(text, k=k, filters=filters).hits
            )
        )
        for text, end in queries
    ]


def captioned_library(data: Path, folder: Path, pictures: int, encoder: LazyEncoder) -> None:
    """Write an index of `pictures` that have captions and random vectors; one that is there stays."""
    rows = _lines(data / "flickr8k/train.jsonl")
    captions = itertools.cycle([row["captions"][nth] for nth in range(5) for row in rows])
    dim = encoder.towers().dim
    with Catalog.open(folder, write=True) as catalog:
        if catalog.stats().pictures:
            return
        catalog.register_encoder(encoder.encoder_id, spec="builtin", config_json="{}", dim=dim)
        for number, caption in zip(range(pictures), captions, strict=False):
            num = catalog.add_picture(
                image_id=f"{number:032x}", width=640, height=480, format="JPEG", bytes=1000,
                captions=[caption], tags=[],
            )  # fmt: skip
            catalog.add_place(num, f"/photos/{number // 1000}/{number}.jpg", size=1000, mtime_ns=1)
        nums = np.arange(1, pictures + 1)
        vectors = np.random.default_rng(0).standard_normal((pictures, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        catalog.add_vectors(encoder.encoder_id, nums, vectors)
        catalog.commit()


def cost(data: Path, work: Path, pictures: int) -> None:
    """Print the milliseconds of searches in a library of captioned pictures."""
    folder, encoder = work / f"captioned-{pictures}", LazyEncoder("builtin")
    captioned_library(data, folder, pictures, encoder)
    searcher = Searcher(Catalog.open(folder), encoder)
    words = [
        (caption, len(name_matches._content_words(parse(caption))))
        for row in _lines(data / "flickr8k/dev.jsonl")
        for caption in map(plain, row["captions"])
    ]
    kinds = {
        "no word in a name": [f"qzx{number}" for number in range(100)],
        "one rare word": ["accordion", "telescope", "castle", "zebra", "violin"] * 20,
        "one word of a fifth": ["dog", "man"] * 50,
        "sentences of nine words": [text for text, n in words if n == 9][:200],
    }
    print(f"{pictures:,} pictures with captions; milliseconds (median, 95th percentile)")
    print(f"{'':<26}{'n':>5}{'search':>18}{'words in names':>18}{'encode':>18}")
    for kind, queries in kinds.items():
        searcher.search(queries[0])
        rows = []
        for query in queries:
            started = time.perf_counter()
            result = searcher.search(query)
            whole = time.perf_counter() - started
            started = time.perf_counter()
            name_matches.match_names(searcher.catalog, parse(query), pictures=pictures, others=0)
            rows.append((whole, time.perf_counter() - started, result.seconds["encode"]))
        columns = (np.percentile(column, (50, 95)) * 1000 for column in zip(*rows, strict=True))
        figures = "".join(f"{median:>9.1f}{p95:>9.1f}" for median, p95 in columns)
        print(f"{kind:<26}{len(queries):>5}{figures}", flush=True)


def plain(caption: str) -> str:
    """Return the caption as words alone, none of them an operator of the query language."""
    return " ".join(re.findall(r"[^\W_]+", caption.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--captioned", type=int, metavar="N")
    arguments = parser.parse_args()
    if arguments.captioned:
        cost(arguments.data, arguments.work, arguments.captioned)
        return
    pictures, encoder = arguments.work / "pictures", LazyEncoder("builtin")
    copy(arguments.data, pictures)
    with Catalog.open(arguments.work / "index", write=True) as catalog:
        index_folders(catalog, [pictures], encoder=encoder)
    catalog = Catalog.open(arguments.work / "index")
    searcher = Searcher(catalog, encoder)
    cifar, flickr = (Filters(folders=(str(pictures / name),)) for name in ("cifar", "flickr"))
    classes = {path.name: path.name for path in sorted((pictures / "cifar").iterdir())}
    captions = [
        (row["captions"][0], f"/flickr/{number:04}.jpg")
        for number, row in enumerate(_lines(arguments.data / "flickr8k/dev.jsonl"))
    ]
    things = [
        (row["names"][0], f"/image_{row['class']:04}.jpg")
        for row in _lines(arguments.data / "imagenet_sample/classes.jsonl")
    ]
    measures: dict[str, Measure] = {
        "CIFAR-10 alone, class names, P@24": lambda: in_folder(searcher, classes, cifar),
        "all, class names, P@24": lambda: in_folder(searcher, classes, None),
        "all, plurals, P@24": lambda: in_folder(searcher, INFLECTED, None),
        "all, several words, P@24": lambda: in_folder(searcher, SEVERAL, None),
        "all, 1,000 folders of one, R@1": lambda: recall(searcher, things, 1),
        "all, 1,000 folders of one, R@24": lambda: recall(searcher, things, 24),
        "Flickr8k alone, captions, R@10": lambda: recall(searcher, captions, 10, flickr),
        "all, captions, R@1": lambda: recall(searcher, captions, 1),
        "all, captions, R@10": lambda: recall(searcher, captions, 10),
    }
    weight = name_matches.NAME_WEIGHT
    print(f"{'':<36}{'n':>5}{'before':>9}{'after':>8}   difference")
    for name, measure in measures.items():
        both = []
        for name_matches.NAME_WEIGHT in (0.0, weight):
            both.append(100 * np.array(measure()))
        change = both[1] - both[0]
        half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
        print(
            f"{name:<36}{len(change):>5}{both[0].mean():>9.1f}{both[1].mean():>8.1f}"
            f"   {change.mean():+.1f} ({change.mean() - half:+.1f} to {change.mean() + half:+.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
