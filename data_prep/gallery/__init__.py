"""The sample gallery: a few hundred public-domain clip-art pictures to index on the first day.

`pictures/` has a folder for each subject; `metadata.jsonl` beside the pictures holds captions and
keywords in the form that `clipkit.records.FolderCaptions` reads. ORIGIN.md says where they are from.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["folder"]


def folder() -> Path:
    """The folder of pictures to index."""
    return Path(__file__).resolve().parent / "pictures"
