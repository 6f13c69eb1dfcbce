"""Rules that reject pictures, captions and labels; every rejection has a reason code.

    blank                 a picture of one colour: a placeholder
    too-small             a picture with a side below `min_side` pixels
    near-duplicate        a picture that looks like one before it (only with near="drop")
    no-caption            none of the picture's captions is left (only with uncaptioned="reject")
    empty                 only white space
    too-short, too-long   below `min_chars`, above `max_chars` characters
    url, file-name        "https://...", "IMG_1234.JPG", "DSC00042"
    placeholder           "no description", "untitled", "n/a"
    no-letters            fewer than three in ten of its characters are letters: "****", "12-345"
    mojibake              lost letters: "caf\\ufffd", or garbled beyond repair
    script                with `scripts` set: most letters belong to other scripts
    repeated              the picture has the caption already
    repeated-on-many      more than `max_repeats` pictures have the caption
    marked-wrong          a correction says that the caption does not fit the picture
    several-labels        a row with two classes or more: a dataset has one label a picture
    other-label           the picture has another label already, by a row before
    not-a-class           a label that is neither a name nor a whole number

Pictures that cannot be read have the reasons of `clipkit.images` (truncated, broken, ...). Captions are
repaired first: HTML entities and tags, control characters, text decoded the wrong way (by ftfy), runs of
white space. Case and punctuation stay.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipkit.errors import InputError
from data_prep.split import MAX_RADIUS

if TYPE_CHECKING:
    import ftfy
    from PIL import Image

# Reasons without a limit: these are switched off by name.
ALLOWABLE = ("blank", "url", "file-name", "placeholder", "no-letters", "mojibake", "marked-wrong")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Limits for pictures and captions; 0 switches a limit off. Raises InputError for a bad limit."""

    min_side: int = 32  # pixels
    min_chars: int = 2
    max_chars: int = 1000
    max_repeats: int = 100  # pictures that may share a caption
    scripts: tuple[str, ...] = ()  # Unicode's names, such as LATIN; none: any
    near: Literal["group", "drop", "ignore"] = "group"  # near-duplicates: in one split, or only one
    radius: int = 15  # bits of 256 in which near-duplicates' hashes may differ, see split.py
    allow: frozenset[str] = frozenset()  # of ALLOWABLE
    uncaptioned: Literal["reject", "keep"] = "reject"  # pictures without a caption

    def __post_init__(self) -> None:
        for name in ("min_side", "min_chars", "max_chars", "max_repeats"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0 (0: off)")
        if not 0 <= self.radius <= MAX_RADIUS:
            raise InputError(f"radius is {self.radius}; it must be 0 to {MAX_RADIUS} bits of 256")
        if self.near not in ("group", "drop", "ignore"):
            raise InputError(f"near is {self.near!r}; it must be group, drop or ignore")
        if self.uncaptioned not in ("reject", "keep"):
            raise InputError(f"uncaptioned is {self.uncaptioned!r}; it must be reject or keep")
        for name in sorted(self.allow - set(ALLOWABLE)):
            raise InputError(f"cannot allow {name!r}; use one of {', '.join(ALLOWABLE)}")


_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_URL = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w{2,}", re.I)
_SUFFIX = r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|hei[cf]|avif|svg|raw|cr2|nef|arw|dng)"
_FILE_NAME = re.compile(
    rf"[^\n]{{0,200}}{_SUFFIX}"  # anything that ends like a picture
    r"|(?:img|dsc[nf]?|dscf|p|pxl|mvimg|gopr|screenshot|scan|image|photo|picture|pict|foto|bild|wp|dji)"
    r"[-_ ]?\(?\d[\d\-_. ]*\)?"  # what cameras and telephones call theirs
    r"|[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.I,
)
_PLACEHOLDERS = frozenset(
    word.strip()
    for word in """
    no description|no caption|no caption available|no description available|no text|no alt text|no title
    |description|caption|alt text|alttext|image description|n/a|na|none|null|nan|nil|undefined|unknown
    |untitled|unnamed|tbd|tba|todo|to do|test|xxx|lorem ipsum|image|picture|photo|photograph|img|pic
    |thumbnail|click to enlarge|image may contain|image not available|no image|no picture
    |keine beschreibung|ohne titel|unbenannt|kein titel|bild|foto|beschreibung|unbekannt
    |sans titre|sans légende|pas de description|sin título|sin descripción|senza titolo|sem título
    """.split("|")
)
_FEWEST_LETTERS = 0.3  # of the characters that are no white space; "Boeing 747-400" has 0.46
_FEWEST_OF_SCRIPT = 0.8  # of the letters


@cache
def _ftfy_config() -> ftfy.TextFixerConfig:
    import ftfy

    return ftfy.TextFixerConfig(unescape_html=True, uncurl_quotes=False, explain=False)


def mend(caption: str) -> str:
    """Return the caption on one line, with HTML entities and wrong decodings undone."""
    if caption.isascii() and caption.isprintable() and not ("&" in caption or "<" in caption):
        return " ".join(caption.split())  # most captions need no repair
    import ftfy

    # JSON can escape half a surrogate pair, which no tokenizer takes
    text = caption.encode("utf-8", "replace").decode("utf-8")
    text = _TAG.sub(" ", ftfy.fix_text(text, _ftfy_config()))
    return " ".join("".join(c if _shows(c) else " " for c in text).split())


def kind_of_repair(original: str, caption: str) -> str:
    """Return what `mend` changed: "white space", "HTML", or "characters" (decoding and controls)."""
    if " ".join(original.split()) == caption:
        return "white space"
    plain = _TAG.sub(" ", html.unescape(original))
    return "HTML" if " ".join(plain.split()) == caption else "characters"


def _shows(character: str) -> bool:
    """Return whether a character is visible: no control character, no mark of order or width.

    Joiners stay: they form letters and emoji.
    """
    return unicodedata.category(character) not in ("Cc", "Co", "Cn", "Cs") and character not in (
        "\u200b\u200e\u200f\u2060\ufeff"
    )


def caption_fault(caption: str, rules: Rules) -> str | None:
    """Return the reason code why a repaired caption is rejected, or None."""
    if not caption:
        return "empty"
    bare = caption.casefold().strip(" .,:;!?-_–—()[]<>{}\"'*#/…")
    if "placeholder" not in rules.allow and bare in _PLACEHOLDERS:
        return "placeholder"
    if len(caption) < rules.min_chars:
        return "too-short"
    if rules.max_chars and len(caption) > rules.max_chars:
        return "too-long"
    if "url" not in rules.allow and _URL.fullmatch(caption):
        return "url"
    if "file-name" not in rules.allow and _FILE_NAME.fullmatch(caption):
        return "file-name"
    if "mojibake" not in rules.allow and _garbled(caption):
        return "mojibake"
    letters = [c for c in caption if c.isalpha() or unicodedata.category(c)[0] == "M"]
    visible = sum(not c.isspace() for c in caption)
    if "no-letters" not in rules.allow and len(letters) < _FEWEST_LETTERS * visible:
        return "no-letters"
    if rules.scripts and letters:
        names = tuple(script.upper() for script in rules.scripts)
        of_them = sum(unicodedata.name(c, "").startswith(names) for c in letters)
        if of_them < _FEWEST_OF_SCRIPT * len(letters):
            return "script"
    return None


def _garbled(caption: str) -> bool:
    if caption.isascii():
        return False
    from ftfy.badness import is_bad

    return "\ufffd" in caption or is_bad(caption)


def label_text(label: object, classes: Sequence[str] | None) -> str | None:
    """Return the name of the one class that a row's label means; None for no label.

    Raises LabelError for several classes, and for anything that is neither a name nor a whole number.
    """
    names = class_names(label, classes)
    if len(names) > 1:
        raise LabelError("several-labels", f"{len(names)} classes: {', '.join(names):.200}")
    return names[0] if names else None


def class_names(label: object, classes: Sequence[str] | None) -> list[str]:
    """Return the classes that a row's label means, each once: as text, on one line.

    A numbered class has its name in `classes`, if known there. Raises LabelError for anything that is
    neither a name nor a whole number.
    """
    names = []
    for item in label if isinstance(label, list | tuple) else [label]:
        if isinstance(item, bool) or not isinstance(item, int | str | None):
            raise LabelError("not-a-class", f"a label must be a name or a number, got {item!r:.80}")
        if isinstance(item, int) and classes is not None and 0 <= item < len(classes):
            item = classes[item]
        # A folder's name need not be UTF-8, and JSON can escape half a surrogate pair.
        text = "" if item is None else str(item).encode("utf-8", "backslashreplace").decode()
        names.append(" ".join(text.split()))
    return [name for name in dict.fromkeys(names) if name]


class LabelError(ValueError):
    """A label that a dataset cannot hold; `reason` is a reason code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def same_caption(caption: str) -> str:
    """Return a key that is equal for captions that differ in case, Unicode form or full stop only."""
    return unicodedata.normalize("NFKC", caption).casefold().rstrip(" .!")


def picture_fault(
    rgb: Image.Image, width: int, height: int, rules: Rules
) -> tuple[str, str] | None:
    """Return (reason, detail) why a decoded picture is rejected, or None; sizes are the original's."""
    if min(width, height) < rules.min_side:
        return (
            "too-small",
            f"{width} x {height} pixels; the minimum side is {rules.min_side} (--min-side)",
        )
    if "blank" not in rules.allow:
        levels = np.asarray(rgb.resize((32, 32)))  # uint8 (32, 32, 3)
        spread = int(np.ptp(levels, axis=(0, 1)).max())
        if spread <= 4:  # levels of 255: a JPEG of one colour is not quite one
            return "blank", f"one colour all over (within {spread} levels of 255)"
    return None
