"""List the files below a folder that have a picture's suffix, without opening them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import InputError
from clipkit.images import SUFFIXES

# Files that may hold captions and tags of the pictures beside them; see `clipkit.records`.
TEXT_SUFFIXES = frozenset({".txt", ".json", ".jsonl"})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file with a picture's suffix, and its `stat`."""

    path: str
    size: int
    mtime_ns: int
    texts_ns: int = 0  # modification time of its folder's newest file that may hold captions


@dataclass(frozen=True, slots=True)
class Problem:
    """A path without a readable picture: `reason` is a short word to count by, `message` a sentence."""

    path: str
    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1


def distinct_roots(
    folders: Sequence[str | os.PathLike[str]],
    *,
    in_catalog: Callable[[str], bool] = lambda _: False,
) -> list[str]:
    """Return the absolute folders, without those below another one.

    Raises InputError for a path that is not a folder, unless it is `in_catalog`: it may then be a disk
    that is not mounted now.
    """
    roots: list[str] = []
    for folder in sorted({os.path.abspath(os.path.expanduser(f)) for f in folders}):
        if not Path(folder).is_dir() and not in_catalog(folder):
            if Path(folder).exists():
                raise InputError(f"{folder} is a file; give its folder: {os.path.dirname(folder)}")
            raise InputError(f"folder {folder} does not exist; name a folder that holds pictures")
        if not any(folder.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
            roots.append(folder)
    return roots


def walk(root: str, *, skip: str) -> Iterator[FoundFile | Problem]:
    """Yield the files below `root` that have a picture's suffix, in a stable order, each folder once.

    Hidden names and the index's own folder (`skip`) are left out. Symbolic links are followed; one
    that leads to a folder already listed yields a Problem.
    """
    seen: set[tuple[int, int]] = set()
    stack = [root]
    while stack:
        folder = stack.pop()
        try:
            about = os.stat(folder)
            key = (about.st_dev, about.st_ino)
            if key in seen:
                yield Problem(folder, "symlink-loop", "links to a folder that was read already")
                continue
            seen.add(key)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Problem(folder, "unreadable-folder", f"folder cannot be read: {error.strerror}")
            continue
        texts_ns = max((_changed(e) for e in entries if _suffix(e) in TEXT_SUFFIXES), default=0)
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            picture = _suffix(entry) in SUFFIXES
            try:
                if entry.is_dir():
                    if os.path.realpath(entry.path) != skip:
                        below.append(entry.path)
                    continue
                if not picture:
                    continue
                about = entry.stat()
            except OSError as error:
                if picture:
                    message = f"file cannot be read: {error.strerror}"
                    yield Problem(entry.path, "unreadable", message)
                continue
            if stat.S_ISREG(about.st_mode):
                yield FoundFile(entry.path, about.st_size, about.st_mtime_ns, texts_ns)
            else:
                message = "not a file: a pipe, socket or device"
                yield Problem(entry.path, "not-a-file", message, about.st_size, about.st_mtime_ns)
        stack += reversed(below)


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _changed(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_mtime_ns
    except OSError:
        return 0
