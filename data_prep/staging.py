"""Results of a build, and the staging folder that replaces the old dataset atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipkit import __version__
from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.sources import Source

MANIFEST = "dataset.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a build."""

    phase: Literal["reading", "comparing", "writing"]
    done: int  # rows read, or pictures written
    total: int | None
    rejected: int


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build. `rejected`: {"row" | "picture" | "caption" | "label": {reason: count}}."""

    folder: Path
    rows: int
    pictures: Mapping[str, int]  # by split
    captions: int
    mended: Mapping[str, int]  # captions, by `kind_of_repair`
    groups: int  # of look-alikes, two pictures or more
    parted: int  # groups that official splits part
    rejected: Mapping[str, Mapping[str, int]]
    fingerprint: str
    uncaptioned: int  # of the pictures
    labels: Mapping[str, int]  # pictures by class, the largest first


def check_out(out: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Raise InputError if `out` lies inside a source, or exists and may not be replaced."""
    if not sources:
        raise InputError("nothing to build from; name at least one source")
    for source in sources:
        path = Path(os.path.abspath(source.path))
        if source.kind == "folder" and path in out.parents:
            raise InputError(
                f"--out {out} lies inside the pictures' folder {path}, and would be read as part of it "
                "next time; choose a folder outside"
            )
    if not out.exists():
        return
    if not (out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST).is_file())):
        raise InputError(f"{out} exists and is not a clipkit dataset; choose another --out")
    if any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} exists already; give --overwrite to replace it, or another --out")


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that is removed at the end; one build at a time.

    Raises InputError if another build is under way, or the disk is full or not writable.
    """
    from filelock import FileLock, Timeout

    folder = out.with_name(f".{out.name}.building")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another build is writing {out}; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write into {out.parent}: {error.strerror or error}") from error
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
        folder.mkdir()
        yield folder
    except OSError as error:  # a full disk, a folder that was removed
        raise InputError(f"cannot build {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.lock").unlink(missing_ok=True)
        lock.release()


def swap(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`, then remove the folder that was there."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(
    path: Path,
    built: Built,
    sources: Sequence[Source],
    *,
    options: Mapping[str, Any],
    command: str,
) -> None:
    """Write dataset.json, with sources, options, counts and versions, and flush it to the disk."""
    import imagehash
    import PIL

    manifest = {
        "format": "clipkit dataset, 1",
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": built.fingerprint,
        "command": command,
        "sources": [
            {"kind": s.kind, "path": s.path, "description": s.description} for s in sources
        ],
        "options": options,
        "counts": {
            "rows": built.rows,
            "pictures": built.pictures,
            "captions": built.captions,
            "uncaptioned_pictures": built.uncaptioned,
            "classes": len(built.labels),
            "mended_captions": built.mended,
            "groups_of_look_alikes": built.groups,
            "parted_by_official_splits": built.parted,
            "rejected": built.rejected,
        },
        "versions": {
            "clipkit": __version__,
            "imagehash": imagehash.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "replace"))  # a path need not be UTF-8
