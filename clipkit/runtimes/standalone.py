"""Encode pictures and texts with exported towers and ONNX Runtime; neither clipkit nor torch is needed.

    pip install onnxruntime numpy pillow tokenizers ftfy
    python example.py "a red car" "a cat" photo.jpg          # prints the cosines

clipkit copies this file beside the towers that it exports, and prepares pictures and texts with it.
"""

from __future__ import annotations

import html
import json
import os
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# Read when ONNX Runtime is imported: 1.32 reports its use to Microsoft unless it is told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class Towers:
    """The two towers of an exported folder, as export.json describes them."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        folder = Path(folder)
        export = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        self.image, self.text = export["image"], export["text"]
        self.image_tower = onnxruntime.InferenceSession(str(folder / self.image["file"]))
        self.text_tower = onnxruntime.InferenceSession(str(folder / self.text["file"]))
        self.tokenizer = open_tokenizer(folder / self.text["tokenizer"], self.text)

    def encode_images(self, files: Sequence[str | Path]) -> npt.NDArray[np.float32]:
        """Encode picture files as float32 (N, D), unit rows."""
        pixels = np.stack(
            [preprocess(Image.open(file).convert("RGB"), self.image["input"]) for file in files]
        )
        rows: npt.NDArray[np.float32] = self.image_tower.run(None, {"pixels": pixels})[0]
        return rows

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts as float32 (N, D), unit rows."""
        tokens = tokenize(self.tokenizer, texts, self.text)
        rows: npt.NDArray[np.float32] = self.text_tower.run(None, {"tokens": tokens})[0]
        return rows


# ---- pictures


def preprocess(image: Image.Image, settings: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Resize an RGB picture, then crop or pad it: uint8 (3, H, W), from 0 to 255."""
    height, width = settings["shape"][2:]
    if settings["resize_mode"] == "shortest":  # a long strip: the crop would drop its ends anyway
        wide, tall = min(image.width, 16 * image.height), min(image.height, 16 * image.width)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    size = resized(image.width, image.height, width, height, settings["resize_mode"])
    if image.size != size:
        bilinear = settings["interpolation"] == "bilinear"
        resampling = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        image = image.resize(size, resampling)
    if image.width < width or image.height < height:
        missing_w, missing_h = max(width - image.width, 0), max(height - image.height, 0)
        size = (image.width + missing_w, image.height + missing_h)
        padded = Image.new("RGB", size, (settings["fill"],) * 3)
        padded.paste(image, (missing_w // 2, missing_h // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def resized(width: int, height: int, to_width: int, to_height: int, mode: str) -> tuple[int, int]:
    """Return the (width, height) to resize to: "squash" to the tower's, else with the same aspect so
    that the "shortest" or the "longest" side fits."""
    if mode == "squash":
        return to_width, to_height
    ratios = (width / to_width, height / to_height)
    if mode == "longest":
        return max(1, round(width / max(ratios))), max(1, round(height / max(ratios)))
    if to_width == to_height:  # torchvision's Resize(int): the longer side is cut, not rounded
        longer = int(to_width * max(width, height) / min(width, height))
        return (longer, to_height) if width > height else (to_width, longer)
    return round(width / min(ratios)), round(height / min(ratios))


# ---- texts


def open_tokenizer(file: Path, settings: Mapping[str, Any]) -> Any:
    """Open a tokenizer.json; texts are cut at the context length, their last token stays."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(settings["context_length"])
    return tokenizer


def tokenize(
    tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]
) -> npt.NDArray[np.int64]:
    """Tokenize texts: int64 (N, L), padded to the longest text, or to the context length for a tower
    that always takes that."""
    rows = [line.ids for line in tokenizer.encode_batch([clean(t, settings) for t in texts])]
    longest = max(map(len, rows), default=0)
    length = longest if settings["any_length"] else settings["context_length"]
    tokens = np.full((len(rows), length), settings["pad_id"], np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    tokens[np.isin(tokens, settings["zero_ids"])] = 0
    return tokens


def clean(text: str, settings: Mapping[str, Any]) -> str:
    """Mend mangled characters and white space as in training: open_clip/tokenizer.py."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # takes 45 ms

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    if settings["clean"] == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    text = " ".join(text.split())
    return text if settings["clean"] == "whitespace" else text.lower()


def main(arguments: Sequence[str]) -> None:
    """Print the cosine of each text and each picture file."""
    files = [argument for argument in arguments if Path(argument).is_file()]
    texts = [argument for argument in arguments if argument not in files]
    if not (files and texts):
        sys.exit("usage: python example.py TEXT ... PICTURE ...")
    towers = Towers(Path(__file__).parent)
    cosines = towers.encode_images(files) @ towers.encode_texts(texts).T
    for file, row in zip(files, cosines, strict=True):
        print(file, *(f"{cosine:.3f} {text}" for cosine, text in zip(row, texts, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
