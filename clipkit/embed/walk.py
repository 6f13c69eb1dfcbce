"""List the files below a folder that have a picture's suffix, without opening them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import InputError
from clipkit.images import SUFFIXES
from clipkit.records import METADATA

_SEP = os.sep.encode()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder whose pictures were listed. `texts` is the fingerprint of the files in it that may hold
    captions and tags (see `clipkit.records`), by name, size and modification time; None without any.

    A fingerprint and not the newest time: files that were unpacked or copied keep their old times."""

    path: str
    texts: str | None


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file with a picture's suffix, and its `stat`."""

    path: str
    size: int
    mtime_ns: int
    folder: Folder | None = None

    @property
    def key(self) -> bytes:
        return os.fsencode(self.path)


@dataclass(frozen=True, slots=True)
class Problem:
    """A path without a readable picture: `reason` is a short word to count by, `message` a sentence.

    What lies below a folder with a Problem is unknown, except where the folder was read already under
    another name ("symlink-loop"). `gone` tells that the folder is a link to a place that is not there:
    nothing to report unless there were pictures.
    """

    path: str
    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1
    is_folder: bool = False
    gone: bool = False

    @property
    def key(self) -> bytes:
        return (
            os.fsencode(self.path).rstrip(_SEP) + _SEP if self.is_folder else os.fsencode(self.path)
        )


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


def walk(root: str, *, skip: str) -> Iterator[FoundFile | Problem | Folder]:
    """Yield the files below `root` that have a picture's suffix, in the order of their paths' bytes
    (`key`), each folder once; and every listed Folder itself after all that is in it.

    Hidden names and the index's own folder (`skip`) are left out. Symbolic links are followed; one
    that leads to a folder already listed yields a Problem. The names of one folder are held, no more.
    """
    seen: set[tuple[int, int]] = set()
    opened: list[tuple[Folder, Iterator[bytes]]] = []
    entering: str | None = root
    while True:
        if entering is not None:
            listed = _list(entering, seen)
            entering = None
            if isinstance(listed, Problem):
                yield listed
            else:
                opened.append(listed)
        if not opened:
            return
        folder, names = opened[-1]
        name = next(names, None)
        if name is None:
            yield folder
            opened.pop()
            continue
        path = os.path.join(folder.path, os.fsdecode(name.removesuffix(_SEP)))
        if not name.endswith(_SEP):
            if (item := _look(path, folder)) is not None:
                yield item
        elif os.path.realpath(path) != skip:
            entering = path


def _list(path: str, seen: set[tuple[int, int]]) -> tuple[Folder, Iterator[bytes]] | Problem:
    """Return a folder and the names in it of pictures and, with a separator at the end, folders.

    Sorted so, a name comes where the paths that begin with it come in the order of all paths: "a.jpg"
    before what is in "a", since "." is less than "/", and both before "a0.jpg".
    """
    names, texts = [], []
    try:
        about = os.stat(path)
        if (key := (about.st_dev, about.st_ino)) in seen:
            message = "links to a folder that was read already"
            return Problem(path, "symlink-loop", message, is_folder=True)
        seen.add(key)
        with os.scandir(path) as listing:
            for entry in listing:
                name = os.fsencode(entry.name)
                suffix = os.path.splitext(entry.name)[1].lower()
                if name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    names.append(name + _SEP)
                elif suffix in SUFFIXES:
                    names.append(name)
                elif suffix in (".txt", ".json") or entry.name == METADATA:
                    texts.append(name)
    except OSError as error:
        message = f"folder cannot be read: {error.strerror}"
        gone = isinstance(error, FileNotFoundError)
        return Problem(path, "unreadable-folder", message, is_folder=True, gone=gone)
    names.sort()
    return Folder(path, _fingerprint(path, sorted(texts))), iter(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link that leads to none now but may have: one without
    a picture's suffix to a place that is not there."""
    try:
        if entry.is_dir():
            return True
        is_picture = os.path.splitext(entry.name)[1].lower() in SUFFIXES
        return entry.is_symlink() and not is_picture and not os.path.exists(entry.path)
    except OSError:  # a link to itself: `_look` says so, if it is called a picture
        return False


def _fingerprint(folder: str, texts: Sequence[bytes]) -> str | None:
    """Hash the files that may hold captions by name, size and modification time."""
    if not texts:
        return None
    state = hashlib.blake2b(digest_size=16)
    for name in texts:
        try:
            about = os.stat(os.path.join(os.fsencode(folder), name))
            facts = f"{about.st_size} {about.st_mtime_ns}"
        except OSError as error:
            facts = str(error.errno)
        state.update(name + b"\0" + facts.encode() + b"\0")
    return state.hexdigest()


def _look(path: str, folder: Folder) -> FoundFile | Problem | None:
    """Return the file at `path`, or why it is none; None if it was deleted after it was listed."""
    try:
        about = os.stat(path)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        return Problem(path, "unreadable", f"file cannot be read: {error.strerror}")
    if stat.S_ISREG(about.st_mode):
        return FoundFile(path, about.st_size, about.st_mtime_ns, folder)
    message = "not a file: a pipe, socket or device"
    return Problem(path, "not-a-file", message, about.st_size, about.st_mtime_ns)
