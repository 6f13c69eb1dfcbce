"""Features on disk, found by what they are made from: encoder, precision, and content.

    FOLDER/3f2a9c...-float32-0.1.0/     one encoder at one precision, one version of the preprocessing
        meta.json                       its spec, dim, logit scale and picture side
        pictures/9e41....safetensors    ids uint8 (n, 16), vectors float32 (n, D)
        pictures-5d0c.../               the same under a transform
        texts/

An id is the hash of a picture's bytes or of a text, never a path: a changed file is a miss, a renamed
one a hit, and an overwritten checkpoint another encoder. A shard's name is the hash of its bytes, so
damage is seen and the shard dropped. Shards are written aside, renamed and never changed: several
processes may write at once, and what was written before a crash is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

import clipkit

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
# What an id does not tell: how bytes become vectors. Raise it when decoding or resizing changes.
PREPROCESSING = f"{clipkit.__version__}-1"
META = "meta.json"
ROWS_A_SHARD = 4096


class FeatureCache:
    """Features of pictures and texts below `folder`; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def shelf(self, encoder_id: str, precision: str, kind: str) -> Shelf:
        """The features of one encoder and kind: "pictures", "texts" or "pictures-..."."""
        home = self._home(encoder_id, precision)
        return Shelf(None if home is None else home / kind)

    def meta(self, encoder_id: str, precision: str) -> dict[str, Any]:
        """What `keep_meta` kept; empty if nothing, or nothing whole."""
        home = self._home(encoder_id, precision)
        if home is None:
            return {}
        try:
            kept = json.loads((home / META).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def keep_meta(self, encoder_id: str, precision: str, meta: Mapping[str, Any]) -> None:
        """Keep an encoder's few facts beside its features."""
        home = self._home(encoder_id, precision)
        if home is not None and self.meta(encoder_id, precision) != meta:
            _write(home / META, json.dumps(meta, indent=2).encode())

    def _home(self, encoder_id: str, precision: str) -> Path | None:
        name = f"{encoder_id}-{precision}-{PREPROCESSING}"
        return None if self.folder is None else self.folder / name


@dataclass(slots=True)
class Shelf:
    """The vectors of one encoder and kind. One thread uses it; processes may share the folder."""

    folder: Path | None
    _ids: list[bytes] = field(default_factory=list)
    _vectors: list[Float32] = field(default_factory=list)

    def find(self, ids: Sequence[bytes]) -> dict[bytes, Float32]:
        """The vectors, float32 (D,), of those ids (16 bytes each) that are there."""
        found: dict[bytes, Float32] = {}
        wanted = set(ids)
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if not wanted:
                break
            try:
                keys = _ids_of(path)
                if wanted.isdisjoint(keys):
                    continue
                vectors = _vectors_of(path)
            except FileNotFoundError:  # dropped by another process just now
                continue
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("dropped the damaged features in %s: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            found |= {k: v for k, v in zip(keys, vectors, strict=True) if k in wanted}
            wanted.difference_update(keys)
        return found

    def add(self, ids: Sequence[bytes], vectors: Float32) -> None:
        """Keep vectors (n, D); on disk with the next `flush`, or now if they are many."""
        if self.folder is None:
            return
        self._ids += ids
        self._vectors.append(np.ascontiguousarray(vectors, np.float32))
        if len(self._ids) >= ROWS_A_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one shard."""
        if self.folder is None or not self._ids:
            return
        ids = np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, 16)
        content = safetensors.save({"ids": ids, "vectors": np.concatenate(self._vectors)})
        _write(self.folder / f"{_digest(content)}.safetensors", content)
        self._ids, self._vectors = [], []


def _ids_of(path: Path) -> list[bytes]:
    """A shard's ids, without its vectors. Not checked: whoever finds one there reads the rest."""
    with safe_open(path, framework="np") as shard:
        ids = shard.get_tensor("ids")
    if ids.dtype != np.uint8 or ids.ndim != 2 or ids.shape[1] != 16:
        raise ValueError(f"its ids are {ids.dtype} {ids.shape}")
    raw = ids.tobytes()
    return [raw[start : start + 16] for start in range(0, len(raw), 16)]


def _vectors_of(path: Path) -> Float32:
    content = path.read_bytes()
    if _digest(content) != path.stem:
        raise ValueError("it is not what was written")
    vectors: Float32 = safetensors.load(content)["vectors"]
    return vectors


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Aside, then renamed: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path.parent) as (file, name):
        file.write(content)
        file.close()
        os.replace(name, path)


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[tuple[Any, str]]:
    file = tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False)  # noqa: SIM115
    try:
        yield file, file.name
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise
