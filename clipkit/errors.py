"""The errors that clipkit raises on purpose.

    ClipkitError                 root of all: catch this one
    ├── InputError               the input or the request is invalid (CLI exit 2, HTTP 4xx)
    │   ├── ImageError           a picture cannot be read or exceeds a limit; has a short `reason`
    │   ├── QueryError           a query cannot be parsed
    │   ├── ModelError           a model spec is unknown, unreachable or unsuitable
    │   ├── DatasetError         a dataset's files do not follow its format
    │   └── EncoderMismatch      stored vectors and query are of different models
    ├── IndexDamaged             a file of the index is not what was written (CLI exit 1, HTTP 5xx)
    └── CatalogBusy              another process is writing to this index (CLI exit 1, HTTP 409)

A message is one sentence with the cause, the value, the limit and the remedy:
"picture is 212 MP; the limit is 100 MP; resize it or raise --max-megapixels".
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping


class ClipkitError(Exception):
    """Root of clipkit's errors."""


class InputError(ClipkitError):
    """The input or the request is invalid."""


class ImageError(InputError):
    """A picture cannot be read. `reason` is a short, stable word for counting, such as "truncated"."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class QueryError(InputError):
    """A query cannot be parsed."""


class ModelError(InputError):
    """A model spec is unknown, unreachable or unsuitable."""


class DatasetError(InputError):
    """A dataset's files do not follow its format."""


class EncoderMismatch(InputError):
    """Stored vectors and query are of different models and cannot be compared."""


class IndexDamaged(ClipkitError):
    """A file of the index is not what was written."""


class CatalogBusy(ClipkitError):
    """Another process is writing to this index."""


# ---- sentences about a wrong value: the same for a flag, a key of a file and an argument


def suggestion(value: str, choices: Iterable[str], otherwise: str = "use one of") -> str:
    """Return "did you mean 'lora'?" with the choice nearest to `value`, or else name all choices."""
    choices = list(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(choices)}"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{name} is {value!r}; {suggestion(str(value), choices)}")


_LIMITS: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def check_limits(name: str, value: float, **limits: float) -> None:
    """Raise InputError unless low <= value <= high and above < value < below, where they are given."""
    if not all(_LIMITS[kind][1](value, limit) for kind, limit in limits.items()):  # NaN fails too
        bounds = " and ".join(f"{_LIMITS[k][0]} {limits[k]:g}" for k in _LIMITS if k in limits)
        if limits.keys() == {"low", "high"}:
            bounds = f"{limits['low']:g} to {limits['high']:g}"
        raise InputError(f"{name} is {value}; it must be {bounds}")
