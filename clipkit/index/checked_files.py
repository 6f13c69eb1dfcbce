"""Files that are read back as they were written, or not at all: sizes, SHA-256, and a manifest.

A snapshot's folder is complete or absent: the files are written and synced beside the goal, the
manifest last, and the folder is then renamed. The manifest holds every file's size, the SHA-256 of
each file that is loaded whole, and a checksum of itself. Of single-byte damage in an index file,
Faiss alone misses 2-34 % and returns wrong neighbours.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clipkit import durable
from clipkit.errors import IndexDamaged

MANIFEST = "manifest.json"
REMEDY = "the index is rebuilt from the catalog by: clipkit index"
_PIECE = 1 << 22  # bytes hashed and moved at a time

Bytes = bytes | memoryview | npt.NDArray[Any]  # a contiguous array stands for its bytes


class FileWriter:
    """A new file, for a `with` block; at its end the file is on the disk and `entry` is its size and,
    with `hashed`, its SHA-256, as the manifest holds them."""

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self._path = path
        self._digest = hashlib.sha256() if hashed else None
        self._size = 0

    def __enter__(self) -> Self:
        self._file = self._path.open("xb")
        return self

    def write(self, data: Bytes) -> int:
        """Append the bytes of `data`; return how many."""
        view = _flat(data)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            if self._digest is not None:
                self._digest.update(piece)
            durable.write(self._file, piece)
        self._size += len(view)
        return len(view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                durable.fsync(self._file)

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        digest = {} if self._digest is None else {"sha256": self._digest.hexdigest()}
        return {"bytes": self._size, **digest}


def write_npy(folder: Path, name: str, array: npt.NDArray[Any]) -> dict[str, Any]:
    """Write an array as `name` (.npy); return its entry."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with FileWriter(folder / name, hashed=True) as file:
        file.write(header.getvalue())
        file.write(array)
    return file.entry


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest."""
    with FileWriter(folder / MANIFEST, hashed=False) as file:
        file.write(_render(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the manifest's facts, with "files". Raises IndexDamaged if a byte of it has changed."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    try:
        facts = json.loads(raw)
        del facts["checksum"]
        intact = _render(facts) == raw and isinstance(facts["files"], dict)
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise IndexDamaged(f"{path} is not what was written (checksum); {REMEDY}")
    result: dict[str, Any] = facts
    return result


def check_size(folder: Path, facts: Mapping[str, Any], name: str) -> Path:
    """Return the path of a file of the manifest. Raises IndexDamaged if its size differs."""
    path = folder / name
    try:
        written, size = facts["files"][name]["bytes"], path.stat().st_size
    except KeyError as error:
        raise IndexDamaged(f"{path} is not listed in {MANIFEST}; {REMEDY}") from error
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    if size != written:
        raise IndexDamaged(
            f"{path} is not what was written: it has {size} bytes, {written} were written; {REMEDY}"
        )
    return path


def check_file(folder: Path, facts: Mapping[str, Any], name: str) -> Path:
    """Return the path of a file of the manifest after hashing it, a piece at a time.

    Raises IndexDamaged if it is not what was written.
    """
    path = check_size(folder, facts, name)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    _compare(path, digest.hexdigest(), facts["files"][name])
    return path


def read_file(
    folder: Path,
    facts: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """Return a checked file's array, float or integer of this shape: its last bytes, for a .npy has a
    header before. Raises IndexDamaged if it is not what was written."""
    path = check_size(folder, facts, name)
    array = np.empty(shape, dtype)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    _compare(path, hashlib.sha256(raw).hexdigest(), facts["files"][name])
    if len(raw) < array.nbytes:
        raise IndexDamaged(f"{path} is too short for {shape}; {REMEDY}")
    view = _flat(array)
    view[:] = raw[len(raw) - len(view) :]
    return array


def _compare(path: Path, digest: str, entry: Mapping[str, Any]) -> None:
    if digest != entry.get("sha256"):
        raise IndexDamaged(f"{path} is not what was written: its SHA-256 differs; {REMEDY}")


def _render(facts: Mapping[str, Any]) -> bytes:
    """Serialise the facts with their checksum, always alike; floats round-trip through repr."""

    def dump(value: Mapping[str, Any]) -> str:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False)

    checksum = hashlib.sha256(dump(facts).encode()).hexdigest()
    return f"{dump({**facts, 'checksum': checksum})}\n".encode()


def _flat(data: Bytes) -> memoryview:
    """Return a view of the bytes of `data`; numpy's view also accepts empty arrays."""
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8).data
    return memoryview(data)
