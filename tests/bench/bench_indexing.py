"""How fast are pictures indexed? clipkit against a plain OpenCLIP loop, side by side in one run.

    python tests/bench/bench_indexing.py [--pictures 300] [--repeats 3] [--keep FOLDER]

The pictures are JPEGs of 1 to 12 megapixels (evenly over the logarithm) that are like photographs to
a decoder: clip art of the sample gallery, enlarged, under noise whose amplitude falls with frequency
as in natural scenes (1/f: Field 1987), at quality 90. The same weights do both: ViT-B-32 at random
from a seed, and the built-in model; in each repeat the two take turns over the same files.

    plain     PIL decodes in full, OpenCLIP's own transform, float32, batches of 32
    clipkit   `index_folders` into a new catalog: also hashes, makes thumbnails and writes them

Loading the models is left out on both sides. Cosines are between the two embeddings of a picture.
A picture that either side skips ends the benchmark with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipkit import checkpoint, towers
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from data_prep import gallery

Float32 = npt.NDArray[np.float32]
SHAPES = ((4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (1, 1))  # width : height, as cameras have them


# ---- pictures


def make_pictures(folder: Path, *, count: int, seed: int) -> list[Path]:
    """`count` JPEGs of 1 to 12 megapixels; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    if all(path.is_file() for path in paths):
        return paths
    tiles = [_fractal_noise(4096, np.random.default_rng([seed, n])) for n in range(4)]
    drawings = sorted(gallery.folder().glob("*/*.png"))
    for number, path in enumerate(paths):
        rng = np.random.default_rng([seed, 1000 + number])
        area = 1e6 * 12 ** ((number + 0.5) / count)
        wide, high = SHAPES[number % len(SHAPES)]
        size = round((area * wide / high) ** 0.5), round((area * high / wide) ** 0.5)
        drawing = drawings[int(rng.integers(len(drawings)))]
        _picture(drawing, size, tiles, rng).save(path, quality=90, subsampling="4:2:0")
    return paths


def _fractal_noise(side: int, rng: np.random.Generator) -> Float32:
    """float32 (side, side), mean 0, deviation 1, repeating at its edges; amplitude 1/f, and less
    beyond half the resolution, where lenses and demosaicing blur."""
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    vertical, horizontal = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(vertical, horizontal)
    frequency[0, 0] = np.inf  # so that there is no constant part
    spectrum *= np.exp(-((frequency / 0.3) ** 2)) / frequency
    noise = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    return noise / noise.std()


def _picture(
    drawing: Path, size: tuple[int, int], tiles: Sequence[Float32], rng: np.random.Generator
) -> Image.Image:
    with Image.open(drawing) as opened:
        page = Image.new("RGBA", opened.size, "white")
        page.alpha_composite(opened.convert("RGBA"))
    width, height = size
    scene = np.asarray(page.convert("YCbCr").resize(size, Image.Resampling.BICUBIC), np.float32)
    luma, chroma = rng.choice(len(tiles), 2, replace=False)
    scene = 0.45 * (scene - 128) + 128
    for channel, tile, strength in ((0, luma, 36), (1, chroma, 6), (2, chroma, -6)):
        top, left = rng.integers(4096, size=2)
        rows = np.arange(top, top + height) % 4096
        columns = np.arange(left, left + width) % 4096
        scene[..., channel] += strength * tiles[tile][np.ix_(rows, columns)]
    scene[..., 0] += rng.standard_normal((height, width), dtype=np.float32)  # the sensor's
    pixels = scene.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "YCbCr")


# ---- the two ways; each gives float32 (N, D), unit rows in the order of the paths


def save_vit_b_32(folder: Path, *, seed: int) -> Path:
    """An OpenCLIP folder of ViT-B-32 at random, written without clipkit."""
    import open_clip
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = open_clip.create_model("ViT-B-32")
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_model(model, str(folder / "open_clip_model.safetensors"))
    return folder


def plain_loop(spec: str) -> Callable[[Sequence[Path]], Float32]:
    """What one writes after reading OpenCLIP's README."""
    import open_clip

    folder = checkpoint.find_folder(spec)
    assert folder is not None
    kept = {}
    if (folder / checkpoint.TEXT_CONFIG_FILE).is_file():
        # OpenCLIP would ask the hub for a Hugging Face text tower's settings; they lie here too.
        text = checkpoint.read_config(folder)[0]["text_cfg"]
        kept["text_cfg"] = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", **kept)
    model.eval()

    def embed(paths: Sequence[Path]) -> Float32:
        rows = []
        with torch.no_grad():
            for start in range(0, len(paths), 32):
                pictures = [Image.open(path).convert("RGB") for path in paths[start : start + 32]]
                batch = torch.stack([transform(picture) for picture in pictures])
                rows.append(model.encode_image(batch, normalize=True))
        return torch.cat(rows).numpy()

    return embed


def clipkit_index(encoder: Any) -> Callable[[Sequence[Path]], Float32]:
    def embed(paths: Sequence[Path]) -> Float32:
        with tempfile.TemporaryDirectory() as place, Catalog.open(place, write=True) as catalog:
            summary = index_folders(
                catalog,
                [paths[0].parent],
                encoder=encoder,
            )
            if summary.skipped or summary.embedded != len(paths):
                sys.exit(f"clipkit indexed {summary.embedded} of {len(paths)}: {summary.reasons}")
            stored = catalog.vectors(encoder.encoder_id)
            nums = stored.nums.tolist()
            pictures = catalog.rows(nums)
            row_of = {Path(pictures[num].path): row for row, num in enumerate(nums)}
            return stored.vectors[[row_of[path] for path in paths]].astype(np.float32)

    return embed


# ---- timing


@dataclass(eq=False)
class Way:
    name: str
    embed: Callable[[Sequence[Path]], Float32]
    seconds: list[float] = field(default_factory=list)
    vectors: Float32 | None = None

    def run(self, paths: Sequence[Path]) -> None:
        started = time.perf_counter()
        vectors = self.embed(paths)
        self.seconds.append(time.perf_counter() - started)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare(spec: str, title: str, paths: Sequence[Path], *, repeats: int) -> None:
    plain = Way(f"{title}: plain loop, float32", plain_loop(spec))
    ways = [plain]
    for precision in dict.fromkeys((towers.load(spec).precision, "float32")):
        encoder = towers.load(spec, precision=precision)
        ways.append(Way(f"{title}: clipkit, {precision}", clipkit_index(encoder)))
    with tempfile.TemporaryDirectory() as few:  # memory, kernels and threads: by no one's clock
        warm = [Path(shutil.copy(path, few)) for path in sorted(paths[:: max(1, len(paths) // 16)])]
        for way in ways:
            way.embed(warm)
    for _ in range(repeats):
        for way in ways:
            way.run(paths)
    for way in ways:
        rates = sorted(len(paths) / seconds for seconds in way.seconds)
        against = [a / b for a, b in zip(plain.seconds, way.seconds, strict=True)]
        cosines = (plain.vectors * way.vectors).sum(axis=1)
        print(
            f"{way.name:<36} {statistics.median(rates):8.1f} {rates[0]:7.1f}-{rates[-1]:<7.1f}"
            f" {statistics.median(against):6.2f} {min(against):6.2f}-{max(against):<6.2f}"
            f" {cosines.mean():9.5f} {cosines.min():9.5f}",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--pictures", type=int, default=300)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path, help="folder to make the pictures in, and keep them")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "pictures"
        paths = make_pictures(folder, count=given.pictures, seed=given.seed)
        sizes = [Image.open(path).size for path in paths]
        # Reading every file here also brings them into the page cache, for both sides alike.
        megapixels = statistics.mean(width * height for width, height in sizes) / 1e6
        megabytes = sum(len(path.read_bytes()) for path in paths) / len(paths) / 1e6
        print(
            f"n = {len(paths)} JPEGs, mean {megapixels:.1f} MP and {megabytes:.2f} MB, "
            f"{given.repeats} repeats; {os.cpu_count()} cores, torch {torch.__version__} "
            f"with {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
        print(
            f"{'':<36} {'pics/s':>8} {'spread':^15} {'ratio':>6} {'spread':^13}"
            f" {'cos mean':>9} {'cos min':>9}"
        )
        vit = save_vit_b_32(Path(scratch) / "vit", seed=given.seed)
        compare(str(vit), "ViT-B-32", paths, repeats=given.repeats)
        compare("builtin", "builtin", paths, repeats=given.repeats)


if __name__ == "__main__":
    main()
