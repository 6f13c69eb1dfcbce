"""Fit the built-in model's strengths: how probable a hit is right, by its cosine.

    python -m data_prep.builtin_model.strength --data DIR [--model FOLDER] [--cache DIR]

It searches short texts in libraries of 300 to 100,000 pictures and fits `clipkit.strength.Calibration`
to the first pages of hits. The texts and the pictures that are right for them come from three
datasets that the model was not trained on, each of which counts the same:

1. Flickr8k's development photos: phrases of one to three words that matter, cut from the captions. A
   picture is right if its five captions have all the words. Only words that annotators agree on are
   used: those in at least two of the five captions of a picture that has them at all. Of "dog" five
   captions seldom say nothing, of "happy" they often do.
2. Openclipart's held-out drawings: titles and keywords; right if title and keywords have all the words.
3. CIFAR-10's sample: names of the classes.

A library is a random part of all pictures, so that the same share of it is right for a text at every
size. To the datasets come Flickr8k's and Openclipart's training pictures, which the model was trained
on, ImageNet's sample, CIFAR-10's training pictures and 38,287 random crops. They are right where their
own captions, titles or classes say so, crops where those of the whole picture do. Some texts are
searched where nothing is right, since people also look for what they do not have.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipkit import checkpoint, images, strength, towers
from clipkit.arrays import Bool, Float32, Float64, Int64
from data_prep.builtin_model import sources

DATASETS = ("flickr8k", "openclipart", "cifar10")
PAGE = 24  # hits
SAMPLE = 2_000  # of a library, for the mean cosine; as clipkit.search samples it
SIZES = (300, 1_000, 3_000, 10_000, 30_000, 100_000)  # of libraries
TEXTS = 300  # a library
ABSENT = 0.25  # share of the searches that are for what the library does not have
PHRASES = 1_000
CLASSES = {
    "airplane": "airplane plane aeroplane aircraft jet",
    "automobile": "automobile car",
    "bird": "bird",
    "cat": "cat kitten",
    "deer": "deer",
    "dog": "dog puppy",
    "frog": "frog toad",
    "horse": "horse pony",
    "ship": "ship boat vessel",
    "truck": "truck lorry",
}
_SMALL_WORDS = frozenset(
    "a an the of in on at with and to is are his her its their it that this there by for from as while "
    "one some several other into up out be being has have near next through over down off who which "
    "them they he she him very someone group".split()
)
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "leaves": "leaf"}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture, the dataset it belongs to, and the stems of all words that describe it."""

    name: str  # unique
    dataset: str
    words: frozenset[str]
    read: Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to search for, and the stems that a right picture's description has."""

    text: str
    dataset: str
    words: frozenset[str]


# --------------------------------------------------------------------------- words


def split(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower().replace("'s", ""))


def stem(word: str) -> str:
    """Cut an English word so that its forms mostly agree: "running", "runs" and "run" are "run"."""
    word = _IRREGULAR.get(word, word)
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def stems(*texts: str) -> frozenset[str]:
    return frozenset(stem(w) for text in texts for w in split(text) if w not in _SMALL_WORDS)


def phrases(captions: Sequence[Sequence[str]], count: int, rng: random.Random) -> list[str]:
    """Cut `count` phrases from the captions of pictures, of words that annotators agree on."""
    mentions = defaultdict(list)
    for those in captions:
        for word, n in Counter(w for caption in those for w in stems(caption)).items():
            mentions[word].append(n / len(those))
    agreed = {w for w, shares in mentions.items() if len(shares) >= 5 and np.mean(shares) >= 0.4}
    chosen: dict[str, None] = {}
    every = [caption for those in captions for caption in those]
    for caption in rng.sample(every, len(every)):
        words = split(caption)
        spans = [
            " ".join(words[start:end])
            for start in range(len(words))
            for end in range(start + 1, min(start + 8, len(words)) + 1)
            if not {words[start], words[end - 1]} & _SMALL_WORDS
        ]
        spans = [s for s in spans if len(stems(s)) <= 3 and stems(s) <= agreed and s not in chosen]
        if spans:
            chosen[rng.choice(spans)] = None
        if len(chosen) == count:
            break
    return list(chosen)


# --------------------------------------------------------------------------- data


def reader(path: Path) -> Callable[[], Image.Image]:
    return lambda: images.decode(path.read_bytes()).rgb


def read_pictures(data: Path) -> list[Picture]:
    """Read the three datasets, and Flickr8k's training photos as dataset "flickr8k_train"."""
    pictures = []
    for dataset, split_name in (("flickr8k", "dev"), ("flickr8k_train", "train")):
        pictures += [
            Picture(str(e.path.relative_to(data)), dataset, stems(*e.phrases), reader(e.path))
            for e in sources.read_photos(data, split_name)
        ]
    for e in sources.read_art(data, held_out=True):
        words = stems(*e.phrases, *e.keywords)
        name = str(e.path.relative_to(data))
        pictures.append(Picture(name, "openclipart", words, reader(e.path)))
    for name, words in CLASSES.items():
        for path in sorted((data / "cifar10_sample" / name).iterdir()):
            label = stems(words)
            relative = str(path.relative_to(data))
            pictures.append(Picture(relative, "cifar10", label, reader(path)))
    return pictures


def further_pictures(data: Path) -> Iterable[Picture]:
    """Yield the pictures that fill a library up to 100,000, in this order."""
    for e in sources.read_art(data, held_out=False):
        words = stems(*e.phrases, *e.keywords)
        yield Picture(str(e.path), "openclipart_train", words, reader(e.path))
    sample, train = data / "imagenet_sample", sources.read_photos(data, "train")
    whole = [
        (sample / row["image"], stems(*row["names"]))
        for row in sources.read_rows(sample / "classes.jsonl")
    ]
    for path, words in whole:
        yield Picture(str(path), "imagenet", words, reader(path))
    archive = zipfile.ZipFile(data / "cifar10_train.zip")
    for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
        words = stems(CLASSES[name.split("/")[-2]])

        def from_archive(name: str = name) -> Image.Image:
            return Image.open(io.BytesIO(archive.read(name))).convert("RGB")

        yield Picture(f"cifar10_train/{name}", "cifar10_train", words, from_archive)
    origins = whole * 14 + [(e.path, stems(*e.phrases)) for e in train] * 4
    order = np.random.default_rng(1).permutation(len(origins))
    for i in order[:38_287].tolist():
        path, words = origins[i]

        def cropped(path: Path = path, i: int = i) -> Image.Image:
            return crop(reader(path)(), np.random.default_rng(i))

        yield Picture(f"{path}#{i}", "crop", words, cropped)


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out a random 30 to 60 % of a picture's area."""
    side = rng.uniform(0.3, 0.6) ** 0.5
    width, height = int(picture.width * side), int(picture.height * side)
    x, y = (
        int(rng.integers(0, most + 1)) for most in (picture.width - width, picture.height - height)
    )
    return picture.crop((x, y, x + width, y + height))


def read_texts(data: Path, rng: random.Random) -> list[Text]:
    """Return the texts of the three datasets, as the module says."""
    photos = [e.phrases for e in sources.read_photos(data, "dev")]
    chosen = phrases(photos, PHRASES, rng)
    art = sources.read_art(data, held_out=True)
    titles = [phrase for e in art for phrase in (*e.phrases[:2], *e.keywords)]
    prompts = ("{}", "a {}", "a photo of a {}")
    classes = [(p.format(w), w) for ws in CLASSES.values() for w in ws.split() for p in prompts]
    texts = [Text(p, "flickr8k", stems(p)) for p in chosen]
    texts += [Text(t, "openclipart", stems(t)) for t in dict.fromkeys(titles) if stems(t)]
    return texts + [Text(t, "cifar10", stems(w)) for t, w in classes]


def encode(encoder: towers.DualEncoder, pictures: Sequence[Picture], cache: Path | None) -> Float32:
    """Encode pictures: float32 (N, D), unit rows; kept in and taken from the folder `cache`."""
    names = "\n".join([encoder.encoder_id, *(picture.name for picture in pictures)])
    kept = (
        cache / f"{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}.npy"
        if cache
        else None
    )
    if kept and kept.exists():
        return np.asarray(np.load(kept), np.float32)
    step, rows = encoder.preferred_batch, []
    with ThreadPoolExecutor() as pool:  # the next batch is read while this one is encoded

        def read(start: int) -> Iterator[torch.Tensor]:
            batch = pictures[start : start + step]
            return pool.map(lambda picture: encoder.preprocess(picture.read()), batch)

        ahead = read(0)
        for start in range(0, len(pictures), step):
            batch, ahead = list(ahead), read(start + step)
            rows.append(encoder.encode_images(batch))
            if start // step % 100 == 0:
                print(f"encoding {start} of {len(pictures)} pictures", flush=True)
    vectors = np.concatenate(rows)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, vectors.astype(np.float16))
    return vectors


# --------------------------------------------------------------------------- first pages


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The first pages of several texts' hits, one after the other: all arrays are (H,)."""

    text: Int64  # its number
    cosine: Float64
    pictures: Int64  # in the library
    mean: Float64  # cosine of the text to the library's sample
    spread: Float64  # the standard deviation of these cosines
    right: Bool

    @classmethod
    def joined(cls, parts: Sequence[Hits]) -> Hits:
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in cls.__slots__))


class Pool:
    """Pictures with their vectors, and which of them are right for a text."""

    def __init__(self, pictures: Sequence[Picture], vectors: Float32) -> None:
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.datasets = np.array([picture.dataset for picture in pictures])
        self._having: dict[str, set[int]] = defaultdict(set)
        for row, picture in enumerate(pictures):
            for word in picture.words:
                self._having[word].add(row)

    def rows_of(self, *datasets: str) -> Int64:
        return np.flatnonzero(np.isin(self.datasets, datasets))

    def right(self, text: Text) -> Int64:
        """Return the rows of all pictures that are right for a text, sorted."""
        having = [self._having[word] for word in text.words]
        return np.array(sorted(set.intersection(*having)) if having else [], np.int64)

    def search(
        self, texts: Sequence[Text], vectors: Float32, library: Int64, *, absent: bool = False
    ) -> Hits:
        """Return the first PAGE hits of each text in the pictures of rows `library`, or `absent`: in
        those of them that are not right for it."""
        parts, every = [], vectors @ self.vectors[library].T  # (T, L)
        for number, (text, theirs) in enumerate(zip(texts, every, strict=True)):
            right = self.right(text)
            rows, cosines = library, theirs.astype(np.float64)
            if absent:
                others = ~np.isin(library, right)
                rows, cosines = rows[others], cosines[others]
            sample = cosines[np.random.default_rng(number).permutation(len(rows))[:SAMPLE]]
            best = np.argpartition(-cosines, min(PAGE, len(rows) - 1))[:PAGE]
            parts.append(
                Hits(
                    text=np.full(len(best), number),
                    cosine=cosines[best],
                    pictures=np.full(len(best), len(rows)),
                    mean=np.full(len(best), sample.mean()),
                    spread=np.full(len(best), sample.std()),
                    right=np.isin(rows[best], right),
                )
            )
        return Hits.joined(parts)


def read_pool(encoder: towers.DualEncoder, data: Path, cache: Path | None) -> Pool:
    """Read and encode all pictures."""
    parts = read_pictures(data), list(further_pictures(data))
    vectors = [encode(encoder, pictures, cache) for pictures in parts]
    return Pool([*parts[0], *parts[1]], np.concatenate(vectors))


def fit(
    pool: Pool,
    texts: Sequence[Text],
    vectors: Float32,
    datasets: Sequence[str],
    *,
    encoder_id: str,
    rng: np.random.Generator,
) -> strength.Calibration:
    """Fit a calibration to the texts of `datasets`, each dataset, and each library, weighing the same.
    No picture of the datasets that are left out is in the libraries."""
    left_out = set(DATASETS) - set(datasets)
    left_out |= {f"{dataset}_train" for dataset in left_out} - {"flickr8k_train"}
    usable = np.flatnonzero(~np.isin(pool.datasets, list(left_out)))
    pages, weights = [], []
    for dataset in datasets:
        numbers = [n for n, text in enumerate(texts) if text.dataset == dataset]
        for size in SIZES:
            library = np.sort(rng.choice(usable, min(len(usable), size), replace=False))
            chosen = rng.permutation(numbers)[:TEXTS]
            there = [n for n in chosen if np.isin(pool.right(texts[n]), library).any()]
            for which, absent in ((there, False), (chosen[: TEXTS // 3], True)):
                those = [texts[n] for n in which]
                pages.append(pool.search(those, vectors[which], library, absent=absent))
                share = ABSENT if absent else 1 - ABSENT
                weights.append(np.full(len(pages[-1].right), share / len(pages[-1].right)))
    every = Hits.joined(pages)
    return strength.fit(
        every.cosine,
        every.pictures,
        every.right,
        np.concatenate(weights),
        encoder_id=encoder_id,
        fitted_on={"datasets": list(datasets), "hits": len(every.right)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="see MODEL_CARD.md")
    parser.add_argument("--model", default="builtin", help="a checkpoint folder; written into it")
    parser.add_argument("--cache", type=Path, help="a folder for the pictures' vectors")
    args = parser.parse_args()
    folder = checkpoint.find_folder(args.model)
    if folder is None:
        parser.error(f"--model must be a folder, not {args.model!r}")
    encoder = towers.load(args.model)  # in the precision that this machine indexes in
    texts = read_texts(args.data, random.Random(0))
    calibration = fit(
        read_pool(encoder, args.data, args.cache),
        texts,
        encoder.encode_texts([text.text for text in texts]),
        DATASETS,
        encoder_id=encoder.encoder_id,
        rng=np.random.default_rng(0),
    )
    calibration.write(folder)
    print((folder / strength.FILE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
