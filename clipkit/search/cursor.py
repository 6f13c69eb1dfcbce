"""The cursor of a search: where its next page begins, as text that a client sends back.

It names the last picture that was shown, so that it holds in any later state of the library, in any
process, and after its ranking has left the memory. It is not secret and not signed: whoever alters one
moves within the same result, or is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import asdict, dataclass

from clipkit.errors import InputError

MOST_CHARACTERS = 4_000  # of a cursor; a position in a list by name holds a file's name


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a search goes on: after a picture of a ranking, or after a position of a list."""

    search: str  # `fingerprint` of the search that it belongs to
    shown: int  # hits on all pages before
    place: int = 0  # the last picture's place in its ranking, from 1
    key: float = 0.0  # its key there: the cosine and what its names add
    image_id: str = ""
    position: object = None  # of Catalog.listed; None in a ranking

    def text(self) -> str:
        """Return the cursor as URL-safe text."""
        content = json.dumps(list(asdict(self).values()), separators=(",", ":"), allow_nan=False)
        return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def read(text: str, search: str) -> Cursor:
    """Read a cursor of the search with this fingerprint.

    Raises InputError if it is malformed or of another search.
    """
    cursor = _parsed(text) if isinstance(text, str) and len(text) <= MOST_CHARACTERS else None
    if cursor is None:
        raise InputError(
            "the cursor is malformed; send back the cursor of the last page unchanged, or none for "
            "the first page"
        )
    if cursor.search != search:
        raise InputError(
            "the cursor belongs to another search or to another model; repeat the search that it came "
            "with, or leave it out for the first page"
        )
    return cursor


def fingerprint(*parts: object) -> str:
    """Return a short text that differs for searches that differ in any part."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=9).hexdigest()


def _parsed(text: str) -> Cursor | None:
    try:
        content = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
        search, shown, place, key, image_id, position = content
    except (ValueError, TypeError, RecursionError):
        return None
    usable = (
        isinstance(search, str)
        and isinstance(image_id, str)
        and all(type(count) is int and 0 <= count < 2**53 for count in (shown, place))
        and type(key) in (int, float)
        and math.isfinite(key)
        and (position is not None or place > 0)
    )
    return Cursor(search, shown, place, float(key), image_id, position) if usable else None
