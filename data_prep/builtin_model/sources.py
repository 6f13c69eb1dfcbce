"""Read the data that the built-in model learns from and is measured on.

Two datasets in one folder, in a common shape: `flickr8k/` (photos, `train.jsonl` and `dev.jsonl`
with `{"image", "captions"}`) and `openclipart/` (drawings, `captions.jsonl` with titles and
descriptions as `captions`, and `keywords`).
"""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE = 224  # pixels, the side of a view in training


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and the phrases that are true of it; `art` for a drawing."""

    path: Path
    phrases: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    art: bool = False


NOT_A_KEYWORD = re.compile(
    r"hash\(|unsorted|^architetto|rollandin|^\W*\d*\W*$|[^\x20-\x7e]"
    r"|^(svg|png|appicon|paper symbol|musicstuff|musicsym|clip ?art|openclipart|menu|layout)$"
)
RESPELLED = {"icecream": "ice cream", "bodypart": "body part", "vegitable": "vegetable"}
RESPELLED |= {"roadsign": "road sign", "airtravel": "air travel", "roadtravel": "road travel"}


def clean(text: str) -> str:
    """'BlueMan#207' -> 'Blue Man'; 'L&amp;eacute;ve_02' -> 'Léve'."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"<[^>]+>|https?://\S+", " ", text).replace("_", " ")
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    text = re.sub(r"(?<=[a-z])\d+$", "", re.sub(r"\s*[#(]?\d+\)?\s*$", "", text.strip()))
    return re.sub(r"\s+", " ", text).strip(" .,;:-\"'")


def art_example(path: Path, row: dict[str, Any]) -> Example:
    """Make an example from a drawing's titles and keywords, without authors' and tools' artefacts."""
    phrases: dict[str, str] = {}
    for caption in map(clean, row["captions"]):
        if len(caption) > 2 and caption.isascii():
            phrases.setdefault(caption.lower(), " ".join(caption.split()[:30]))
    words = (clean(word.lower()) for word in row.get("keywords", ()))
    words = (RESPELLED.get(word, word) for word in words)
    keywords = dict.fromkeys(w for w in words if len(w) > 1 and not NOT_A_KEYWORD.search(w))
    return Example(path, tuple(phrases.values()), tuple(keywords), art=True)


def is_held_out(path: Path) -> bool:
    """Return whether a drawing is in the held-out tenth, chosen by its content, not its name."""
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_photos(data: Path, split: str) -> list[Example]:
    folder = data / "flickr8k"
    rows = read_rows(folder / f"{split}.jsonl")
    return [Example(folder / row["image"], tuple(row["captions"])) for row in rows]


def read_art(data: Path, *, held_out: bool, gallery: Path | None = None) -> list[Example]:
    """Read the held-out tenth of the drawings, or the rest.

    gallery: a sample gallery chosen from them (`metadata.jsonl` in its folders, with `source` and
        `captions`), whose better captions come first.
    """
    folder = data / "openclipart"
    better: dict[str, list[str]] = {}
    for path in sorted(gallery.rglob("metadata.jsonl")) if gallery else ():
        better |= {row["source"]: row["captions"] for row in read_rows(path)}
    examples = []
    for row in read_rows(folder / "captions.jsonl"):
        if is_held_out(folder / row["image"]) == held_out:
            captions = [*better.get(row["image"], ()), *row["captions"]]
            examples.append(art_example(folder / row["image"], {**row, "captions": captions}))
    return examples


PHOTO_PROMPTS = (
    "a photo of a {}.",
    "a photo of the {}.",
    "{}",
    "a {}",
    "a picture of a {}",
    "there is a {}",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "{} outside",
    "a blurry photo of a {}.",
    "an old {}",
    "someone with a {}",
)
ART_PROMPTS = (
    "clip art of a {}",
    "a drawing of a {}",
    "{}",
    "a {}",
    "a cartoon {}",
    "an illustration of a {}",
    "a simple {} icon",
)
TITLE_PROMPTS = ("{}", "{}", "{}", "clip art of {}", "clip art of a {}", "a drawing of {}")


def fill(prompts: Sequence[str], phrase: str, rng: random.Random) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", rng.choice(prompts).format(phrase))


def caption(example: Example, rng: random.Random) -> tuple[str, str]:
    """Draw one caption for this epoch, and the phrase that it states."""
    if not example.art:
        text = rng.choice(example.phrases)
        return text, text
    if example.phrases and (rng.random() < 0.5 or not example.keywords):
        phrase = example.phrases[0] if rng.random() < 0.6 else rng.choice(example.phrases)
        return fill(TITLE_PROMPTS, phrase, rng), phrase
    if len(example.keywords) > 1 and rng.random() < 0.3:
        text = ", ".join(rng.sample(example.keywords, min(3, len(example.keywords))))
        return text, text
    phrase = rng.choice(example.keywords or ("clip art",))
    return fill(ART_PROMPTS, phrase, rng), phrase


def fingerprint(examples: Iterable[Example]) -> str:
    """Hash every picture's bytes and every text, in order, to 16 hex digits."""
    state = hashlib.blake2b(digest_size=8)
    for example in examples:
        texts = (text.encode() for text in (*example.phrases, *example.keywords))
        for part in (example.path.read_bytes(), *texts):
            state.update(len(part).to_bytes(8, "big") + part)
    return state.hexdigest()
