"""What a power cut must not take back."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: a file that is new or renamed in it is there after a power cut
    only once its folder is on the disk (fsync(2)). Nothing happens where the system lets no folder be
    opened. OSError from the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
