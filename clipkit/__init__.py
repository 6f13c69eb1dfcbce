"""Search pictures by text, fine-tune the towers on your own captions, and measure both.

    import clipkit

    library = clipkit.Library.open("my-index")      # pictures, searched by text or by example
    library.add("~/Pictures")
    library.search("a red car", k=5)                # in a notebook: a gallery

    encoder = clipkit.load("builtin")               # the two towers themselves
    encoder.encode_texts(["a red car"]) @ encoder.encode_images(pictures).T

`import clipkit` loads nothing else: numpy comes with `Library`, torch with `load` unless it names towers
that `clipkit export` wrote.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.lazy_encoder import load
    from clipkit.library import Hits, Library

__version__ = "0.2.0"

__all__ = ["Hits", "Library", "__version__", "load"]

_HOMES = {"Hits": "clipkit.library", "Library": "clipkit.library", "load": "clipkit.lazy_encoder"}


def __getattr__(name: str) -> Any:
    """Import the front door's names when they are first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
