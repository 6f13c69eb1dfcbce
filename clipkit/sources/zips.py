"""Zips of pictures: read from where they lie, never unpacked."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.sources.folders import FolderRoles
from clipkit.sources.rows import Broken, Options, Row, Source, ZipMember

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OverflowError,
    ValueError,
    struct.error,
)


def open_zip(path: Path, options: Options) -> Source:
    """Open a zip of pictures, whose folders are splits and classes as those of a folder are.

    Other files in it are not read, captions included. Nothing is written, so no name inside can lead
    anywhere. Raises DatasetError if it is no zip or holds no pictures.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            every = [entry for entry in archive.infolist() if not entry.is_dir()]
    except _DAMAGE as error:
        raise DatasetError(f"{path} is no whole zip: {error}") from None
    shown = [entry for entry in every if not _is_hidden(entry.filename)]
    entries = [e for e in shown if PurePosixPath(e.filename).suffix.lower() in SUFFIXES]
    if not entries:
        raise DatasetError(
            f"{path} holds no pictures among its {len(every):,} files; unpack it if they hold data of "
            "another kind"
        )
    roles = FolderRoles.of(PurePosixPath(entry.filename) for entry in entries)

    def rows() -> Iterator[Row | Broken]:
        for entry in sorted(entries, key=lambda entry: entry.filename):
            name = entry.filename
            if entry.flag_bits & 1:
                yield Broken(name, "encrypted", "is encrypted; unpack the zip with its password")
            elif entry.compress_type not in _METHODS:
                yield Broken(name, "compression", "is packed by a rare method; unpack the zip")
            else:
                picture = ZipMember(
                    path,
                    entry.header_offset,
                    entry.compress_size,
                    entry.file_size,
                    entry.CRC,
                    entry.compress_type == zipfile.ZIP_DEFLATED,
                )
                split, label = roles.split_and_label(PurePosixPath(name))
                yield Row(picture, name, name, (), label, split or options.split)

    description = f"zip of {len(entries):,} pictures{roles}, no captions"
    if others := len(shown) - len(entries):
        description += f"; {others:,} other files are not read: unpack it if they are captions"
    return Source("zip", str(path), description, len(entries), rows, roles.classes)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
