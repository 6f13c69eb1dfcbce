"""The folders panel: the indexed folders, and a list of the folders of this machine to choose from.

A folder is named in a page by a key, its path's bytes in hex: it survives whatever bytes the path has.
Listing is the one place where a path from a request is read: only folders, never files, only below
the tops that `browsable` returns, after links are resolved, and nothing hidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import InputError
from clipkit.images import SUFFIXES
from clipkit.wording import list_text, printable

LISTED = 500  # folders of one listing
MEDIA = ("/Volumes", "/media", "/mnt", "/run/media")


@dataclass(frozen=True, slots=True)
class Root:
    """An indexed folder."""

    path: str
    pictures: int
    skipped: int  # files that could not be read
    missing: bool  # the folder is not there now, such as an unmounted disk

    @property
    def key(self) -> str:
        return key_of(self.path)


@dataclass(frozen=True, slots=True)
class Listing:
    """The folders inside a folder; of the start, where `path` is None, the tops."""

    path: str | None
    parent: str | None  # key of the folder above, "" for the start; None at the start
    pictures: int  # directly inside
    folders: tuple[tuple[str, str], ...]  # (key, name)
    left_out: int  # more than LISTED

    @property
    def key(self) -> str:
        return key_of(self.path) if self.path else ""


def key_of(path: str) -> str:
    """Return the key of a path."""
    return os.fsencode(path).hex()


def path_of(key: object) -> str:
    """Return the path of a key. Raises InputError."""
    try:
        path = os.fsdecode(bytes.fromhex(key)) if isinstance(key, str) else ""
    except ValueError:
        path = ""
    if not os.path.isabs(path) or "\0" in path:
        raise InputError(f"{printable(key)!r} names no folder; choose one from the list")
    return path


def browsable(roots: Iterable[str]) -> list[Path]:
    """Return the folders below which may be listed: the home folder, where disks are mounted, and
    the parents of indexed folders."""
    beside = [root if os.path.dirname(root) == os.sep else os.path.dirname(root) for root in roots]
    tops = {Path(top).resolve() for top in (Path.home(), *MEDIA, *beside)} - {Path(os.sep)}
    return sorted(top for top in tops if top.is_dir())


def listing(key: str, tops: Sequence[Path]) -> Listing:
    """List the folders inside the folder of a key, or the tops for "". Raises InputError for a folder
    outside `tops`, a hidden one and one that cannot be read."""
    if not key:
        first = [str(top) for top in tops if not _allowed(top.parent, tops)]
        return Listing(None, None, 0, tuple((key_of(top), top) for top in first), 0)
    typed = path_of(key)
    try:
        folder = Path(typed).resolve(strict=True)
        if not _allowed(folder, tops):
            raise InputError(
                f"{printable(typed)} is not below {list_text([str(top) for top in tops])}; "
                "type its full path instead"
            )
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
        inside = sorted(
            (entry.name.casefold(), entry.name, entry.path) for entry in seen if _is_folder(entry)
        )
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot list the folder {printable(typed)}: {reason}") from None
    links = ((name, Path(path).resolve()) for _, name, path in inside)
    folders = [(key_of(str(path)), name) for name, path in links if _allowed(path, tops)]
    return Listing(
        path=str(folder),
        parent=key_of(str(folder.parent)) if _allowed(folder.parent, tops) else "",
        pictures=sum(os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in seen),
        folders=tuple(folders[:LISTED]),
        left_out=max(0, len(folders) - LISTED),
    )


def _allowed(folder: Path, tops: Sequence[Path]) -> bool:
    """Return whether a resolved path lies below a top, with nothing hidden on the way."""
    below = (folder.relative_to(top).parts for top in tops if folder.is_relative_to(top))
    return any(not any(part.startswith(".") for part in parts) for parts in below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to a disk that is gone
        return False
