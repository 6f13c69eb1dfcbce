"""Write files and folders so that a reader, a crash or a power cut never meets half of one.

Durable data reaches the disk through `write`, `fsync`, `rename` and `sync_folder` alone, called as
`durable.write(...)`: a test that replaces these four can make any one of them fail.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`. Raises OSError from the disk."""
    file.write(data)


def fsync(file: BinaryIO) -> None:
    """Put what was written to `file` on the disk. Raises OSError from the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Rename a file, which may replace another one, or a folder. Raises OSError from the disk."""
    os.replace(old, new)


def write_whole(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `data` to `path`, all or nothing; a file of that name is replaced.

    `sync=False` leaves out the two fsyncs, for files that are built again after a power cut.
    Raises OSError from the disk.
    """
    with whole_file(path, sync=sync) as temporary, temporary.open("wb") as file:
        write(file, data)


@contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it to `path` when the block ends.

    The file is on the disk before it is renamed, and its name before this returns. After an error
    the temporary file is removed and `path` is as it was.
    """
    temporary = _beside(path)
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                fsync(file)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `folder` to fill; rename it when the block ends.

    The caller syncs the files. After an error the temporary folder is removed. Raises OSError if
    `folder` exists and is not empty.
    """
    temporary = _beside(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this id
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
        rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # present only after an error


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: a new or renamed file has its name after a power cut only
    once its folder was synced (fsync(2)). Does nothing on systems that cannot open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that no other thread or process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
