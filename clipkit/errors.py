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
