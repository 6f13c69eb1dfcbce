"""Every error that clipkit raises on purpose, and nothing else.

    ClipkitError                 the root: catch this one
    ├── InputError               what was asked cannot be done (CLI exit 2, HTTP 4xx)
    │   ├── ImageError           a picture cannot be read, or is beyond a limit; carries a short `reason`
    │   ├── QueryError           a search cannot be understood
    │   ├── ModelError           a model spec is unknown, unreachable or unfit
    │   ├── DatasetError         a dataset's files are not as its format says
    │   └── EncoderMismatch      vectors of one encoder, a query of another
    ├── IndexDamaged             a file of the index is not what was written (CLI exit 1, HTTP 5xx)
    └── CatalogBusy              another process writes to this index now

A message is one sentence that says what, the value, the limit and the remedy:
"picture is 212 MP; the limit is 100 MP; resize it or raise --max-megapixels".
"""

from __future__ import annotations


class ClipkitError(Exception):
    """The root of clipkit's errors."""


class InputError(ClipkitError):
    """What was asked cannot be done as asked."""


class ImageError(InputError):
    """A picture cannot be read. `reason` is a short stable word to count by, such as "truncated"."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class QueryError(InputError):
    """A search cannot be understood."""


class ModelError(InputError):
    """A model spec is unknown, unreachable or unfit for the job."""


class DatasetError(InputError):
    """A dataset's files are not as its format says."""


class EncoderMismatch(InputError):
    """Vectors of one encoder cannot be compared with a query of another."""


class IndexDamaged(ClipkitError):
    """A file of the index is not what was written."""


class CatalogBusy(ClipkitError):
    """Another process is writing to this index."""
