"""Text and figures as people read them: the same on the page, in a terminal and in a report."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence

# Unicode's bidirectional controls: in a file name they would reorder the text around it (UAX 9).
_BIDIRECTIONAL = frozenset(
    map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
)
# Control characters, surrogates, line and paragraph separators.
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))


def printable(value: object) -> str:
    """Return `str(value)` in one line, safe to encode as UTF-8 and to show anywhere.

    Character by character: a C0 control becomes its picture (a newline is shown as "␊"); other
    controls, lone surrogates (bytes of a file name that are not UTF-8) and whatever reorders or
    breaks lines become U+FFFD.
    """
    text = str(value)
    if text.isprintable():  # true of nearly every text; bidirectional controls are not printable
        return text
    shown = []
    for char in text:
        if char < " ":
            shown.append(chr(0x2400 + ord(char)))
        elif char in _BIDIRECTIONAL or unicodedata.category(char) in _UNPRINTABLE:
            shown.append("\ufffd")
        else:
            shown.append(char)
    return "".join(shown)


def count(number: int, noun: str = "picture") -> str:
    """1 -> "1 picture", 1234 -> "1,234 pictures"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def class_sizes(sizes: Collection[int], without: int) -> str:
    """Return "10 classes of 40 to 5,000 pictures; 3 pictures without" a label."""
    number = f"{len(sizes):,} {'class' if len(sizes) == 1 else 'classes'}"
    least = f"{min(sizes):,} to " if min(sizes) < max(sizes) else ""
    text = f"{number} of {least}{count(max(sizes))}"
    return f"{text}; {count(without)} without" if without else text


def reason_text(reason: str) -> str:
    """Return why a file was skipped: "not-a-picture" -> "not a picture", "truncated" -> "cut off"."""
    return {"truncated": "cut off"}.get(reason, reason.replace("-", " "))


def duration(seconds: float) -> str:
    """0.042 -> "42 ms", 3.21 -> "3.2 s", 75 -> "75 s", 200 -> "3 min", 7500 -> "2 h 5 min"."""
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """0.4534 -> "45.3 %"; 0.00042 -> "0.042 %"; 0.9999 -> "99.9 %": only all of it is 100.0 %, and
    only nothing, or less than a ten-millionth, is 0.0 %."""
    if 1e-7 <= share < 0.001:
        return f"{signed(100 * share, 1 - math.floor(math.log10(100 * share)))} %"
    return f"{signed(min(100 * share, 99.9) if share < 1 else 100 * share, 1)} %"


def signed(value: float, decimals: int) -> str:
    """Return the rounded number with a minus sign, U+2212, if it is not zero after rounding."""
    text = f"{abs(value):,.{decimals}f}"
    return f"−{text}" if value < 0 and text.strip("0.,") else text


def list_text(items: Sequence[str], most: int = 3) -> str:
    """Return "a, b, c and 4 more"."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
