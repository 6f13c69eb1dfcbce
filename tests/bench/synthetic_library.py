"""An index of synthetic pictures with realistic vectors and metadata, through the Catalog's own calls.

There are no picture files and no thumbnails. Every vector is that of a real picture (of Flickr8k,
openclipart and CIFAR-10, embedded once by the built-in model) and noise of the real vectors'
covariance, at a cosine of 0.8 to 0.95 to it, so that queries of the real text tower rank as they do
on photos. Without these data the centres are random. The same seed makes the same index.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from clipkit.arrays import Float32
from clipkit.catalog import Catalog
from clipkit.index import refresh_snapshot
from clipkit.lazy_encoder import LazyEncoder

BATCH = 10_000
ROOTS = ("/srv/photos", "/srv/archive", "/home/ann/Pictures")
BRANDS = ("Canon EOS", "NIKON D", "SONY ILCE-", "Apple iPhone ", "Google Pixel ", "FUJIFILM X-T")
CAMERAS = tuple(f"{BRANDS[i % 6]}{5 + i // 6}" for i in range(30))
FORMATS = (("JPEG", 0.93), ("PNG", 0.03), ("HEIF", 0.02), ("WEBP", 0.015), ("TIFF", 0.005))
SIZES = ((4032, 3024), (3024, 4032), (6000, 4000), (5184, 3456), (1920, 1080), (1080, 1080))
PLACES = (
    "Italy Norway Berlin Lisbon Kyoto Cornwall Iceland Vienna Corsica Oslo Utah Crete Prague "
    "Scotland Provence Madeira Tyrol Seville Tuscany Bergen"
).split()
EVENTS = "birthday wedding garden skiing hiking concert school christmas picnic regatta".split()
TAGS = "family holiday favourite work print beach mountains dog cat sport portrait night".split()


@dataclass(frozen=True)
class Centres:
    """Real pictures: unit vectors (C, D), and the captions of each (none for CIFAR-10)."""

    vectors: Float32
    captions: Sequence[Sequence[str]]
    real: bool


def centres(data: Path, cache: Path, encoder: LazyEncoder, *, seed: int = 0) -> Centres:
    """Return the vectors of the pictures below `data`, kept in `cache`; random ones without them."""
    pictures = list(_real_pictures(data))
    captions = [texts for _, texts in pictures]
    if not pictures:
        rng = np.random.default_rng(seed)
        return Centres(unit(rng.standard_normal((10_000, 512), np.float32)), [()] * 10_000, False)
    cached = cache / f"centres-{encoder.encoder_id[:16]}-{len(pictures)}.npy"
    if not cached.exists():
        towers = encoder.towers()
        rows = []
        for start in range(0, len(pictures), 64):
            batch = []
            for path, _ in pictures[start : start + 64]:
                with Image.open(path) as image:
                    batch.append(towers.preprocess(image.convert("RGB")))
            rows.append(towers.encode_images(batch))
            if start % 1024 == 0:
                print(f"embedded {start:,} of {len(pictures):,} real pictures", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cached, np.concatenate(rows))
    return Centres(np.load(cached), captions, True)


def _real_pictures(data: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    for part in ("flickr8k/train.jsonl", "flickr8k/dev.jsonl", "openclipart/captions.jsonl"):
        file = data / part
        for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
            row = json.loads(line)
            yield file.parent / row["image"], tuple(row["captions"])
    for path in sorted((data / "cifar10_sample").glob("*/*")):
        yield path, ()


def image_id(seed: int, number: int) -> str:
    return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=16).hexdigest()


def unit(rows: Float32) -> Float32:
    scaled: Float32 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


@dataclass(frozen=True)
class Folder:
    path: str
    start: datetime  # of the event that its pictures are of
    theme: np.ndarray  # the centres that half of its pictures are near to


@dataclass(frozen=True)
class Recipe:
    """What the parts of one synthetic library are drawn from."""

    centres: Centres
    noise: Float32  # (D, D): normal numbers times this have the real vectors' covariance
    folders: Sequence[Folder]
    captions: float = 0.1  # share of pictures with one
    tags: float = 0.05

    @classmethod
    def of(cls, real: Centres, *, pictures: int, captions: float = 0.1, seed: int = 0) -> Recipe:
        residual = (real.vectors - real.vectors.mean(0)).astype(np.float64)
        values, vectors = np.linalg.eigh(residual.T @ residual / len(residual))
        noise = (vectors * np.sqrt(values.clip(0))).T.astype(np.float32)
        rng = np.random.default_rng((seed, 1))
        count = max(1, min(20_000, pictures // 20))
        folders = [_folder(rng, i, len(real.vectors)) for i in range(count)]
        return cls(real, noise, sorted(folders, key=lambda folder: folder.path), captions)


def _folder(rng: np.random.Generator, number: int, pictures: int) -> Folder:
    start = datetime(2010, 1, 1) + timedelta(minutes=int(rng.integers(0, 15 * 365 * 24 * 60)))
    if rng.random() < 0.7:
        name = f"{start:%Y}/{start:%Y-%m} {PLACES[rng.integers(len(PLACES))]} {number}"
    else:
        name = f"Family/{EVENTS[rng.integers(len(EVENTS))]} {number}"
    root = ROOTS[rng.choice(3, p=[0.6, 0.25, 0.15])]
    return Folder(f"{root}/{name}", start, rng.integers(0, pictures, 12))


def make(
    folder: Path,
    *,
    pictures: int,
    recipe: Recipe,
    encoder: LazyEncoder,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Make the index at `folder` and return the seconds of its parts."""
    began = time.monotonic()
    share = np.random.default_rng((seed, 2)).pareto(1.5, len(recipe.folders)) + 0.2
    per_folder = np.floor(share / share.sum() * pictures).astype(int)
    per_folder[: pictures - per_folder.sum()] += 1  # fewer than there are folders
    of = np.repeat(np.arange(len(recipe.folders)), per_folder)
    with Catalog.open(folder, write=True) as catalog:
        for root in ROOTS:
            catalog.add_root(root)
        catalog.register_encoder(
            encoder.encoder_id,
            spec=encoder.spec,
            config_json=encoder.towers().describe(),
            dim=recipe.centres.vectors.shape[1],
        )
        for start in range(0, pictures, BATCH):
            add_batch(catalog, recipe, of[start : start + BATCH], start, encoder.encoder_id, seed)
            catalog.commit()
            seconds = time.monotonic() - began
            done = min(pictures, start + BATCH)
            report(f"{done:,} of {pictures:,} pictures, {seconds:.0f} s, {done / seconds:,.0f}/s")
        filled = time.monotonic() - began
        refresh_snapshot(catalog, encoder.encoder_id, force=True)
    return {"fill_s": filled, "snapshot_s": time.monotonic() - began - filled}


def add_batch(
    catalog: Catalog, recipe: Recipe, of: np.ndarray, first: int, encoder_id: str, seed: int
) -> None:
    """Add pictures first, first + 1, ... with their vectors; `of` gives each one's folder. They are
    not committed."""
    rng = np.random.default_rng((seed, 3, first))
    n = len(of)
    own, vectors = _vectors(rng, recipe, of)
    numbers = rng.random((n, 6))
    camera = np.minimum(rng.zipf(1.4, n) - 1, len(CAMERAS) - 1)
    form = rng.choice(len(FORMATS), n, p=[p for _, p in FORMATS])
    size = rng.integers(0, len(SIZES), n)
    later = rng.integers(0, 5 * 24 * 3600, n)
    nums = np.empty(n, np.int64)
    # since schema 3, texts are a place's
    by_place = "captions" in inspect.signature(catalog.add_place).parameters
    for i in range(n):
        at, where = first + i, recipe.folders[of[i]]
        taken = where.start + timedelta(seconds=int(later[i]))
        captions = recipe.centres.captions[own[i]] or ("a picture",)
        caption = captions[int(numbers[i, 0] * len(captions))]
        texts: dict[str, Sequence[str]] = {}
        if numbers[i, 1] < recipe.captions:
            texts["captions"] = (caption,)
        if numbers[i, 2] < recipe.tags:
            texts["tags"] = tuple({TAGS[int(x * len(TAGS))] for x in numbers[i, 3:5]})
        width, height = SIZES[size[i]]
        num = catalog.add_picture(
            image_id=image_id(seed, at),
            width=width,
            height=height,
            format=FORMATS[form[i]][0],
            bytes=int(1e5 + 6e6 * numbers[i, 3]),
            taken_at=taken.isoformat() if numbers[i, 4] < 0.9 else None,
            camera=CAMERAS[camera[i]] if numbers[i, 4] < 0.9 else None,
            **({} if by_place else texts),
        )
        catalog.add_place(
            num,
            f"{where.path}/{_name(at, taken, numbers[i, 5], caption)}",
            size=int(1e5 + 6e6 * numbers[i, 3]),
            mtime_ns=int(taken.timestamp()) * 10**9,
            **(texts if by_place else {}),
        )
        nums[i] = num
    catalog.add_vectors(encoder_id, nums, vectors)


def _vectors(
    rng: np.random.Generator, recipe: Recipe, of: np.ndarray
) -> tuple[np.ndarray, Float32]:
    """Return the centre of each picture and the vectors (N, D)."""
    rows = recipe.centres.vectors
    themes = np.stack([folder.theme for folder in recipe.folders])
    own = themes[of, rng.integers(0, themes.shape[1], len(of))]
    own = np.where(rng.random(len(of)) < 0.5, own, rng.integers(0, len(rows), len(of)))
    cosine = rng.uniform(0.8, 0.95, (len(of), 1)).astype(np.float32)
    noise = rng.standard_normal((len(of), rows.shape[1]), np.float32) @ recipe.noise
    noise -= (noise * rows[own]).sum(1, keepdims=True) * rows[own]  # orthogonal to the centre
    return own, cosine * rows[own] + np.sqrt(1 - cosine**2) * unit(noise)


def _name(number: int, taken: datetime, kind: float, caption: str) -> str:
    if kind < 0.1:  # named by words
        words = [word for word in caption.lower().split() if word.isalpha()]
        return f"{' '.join(words[1:5]) or 'picture'} {number}.jpg"
    if kind < 0.3:
        return f"{taken:%Y%m%d_%H%M%S}_{number}.jpg"
    return f"{'IMG_' if kind < 0.8 else 'DSC0'}{number % 10_000:04}_{number // 10_000}.jpg"
