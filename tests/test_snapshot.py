"""Saved indexes: whole or not there, and every byte of them checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.bench_index import clustered

from clipkit.errors import IndexDamaged, InputError
from clipkit.index import KINDS, VectorIndex, kinds, read_manifest
from clipkit.index.vector_index import write_folder

N, DIM = 600, 16
FILES = {"ids.npy", "vectors.npy", "manifest.json"}


@pytest.fixture(scope="module", params=list(KINDS))
def index(request: pytest.FixtureRequest) -> VectorIndex:
    rows = clustered(N, DIM, per_cluster=10)
    return VectorIndex.build(np.arange(N)[::-1] + 5, rows, kind=request.param)


@pytest.fixture
def saved(index: VectorIndex, tmp_path: Path) -> Path:
    folder = tmp_path / "snapshots" / "000007"
    index.save(folder, encoder_id="enc", last_seq=42)
    return folder


def test_a_saved_index_is_the_same_when_loaded(index: VectorIndex, saved: Path) -> None:
    loaded = VectorIndex.load(saved)
    queries = clustered(20, DIM, seed=2).astype(np.float32)
    for (a, s), (b, t) in zip(index.search(queries, 10), loaded.search(queries, 10), strict=True):
        assert np.array_equal(a, b) and np.array_equal(s, t)
    assert (loaded.kind, loaded.dim, loaded.size) == (index.kind, DIM, N)
    assert (loaded.measured, dict(loaded.settings)) == (index.measured, dict(index.settings))
    again = saved.with_name("000008")
    loaded.save(again, encoder_id="enc", last_seq=42)
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_the_formats_are_open_and_nothing_else_is_left(index: VectorIndex, saved: Path) -> None:
    structure = set() if index.kind == "exact" else {"candidates.faiss"}
    assert {p.name for p in saved.iterdir()} == FILES | structure
    assert [p.name for p in saved.parent.iterdir()] == ["000007"], "nothing temporary beside it"
    ids, vectors = np.load(saved / "ids.npy"), np.load(saved / "vectors.npy")
    assert ids.tolist() == list(range(5, N + 5)), "sorted, each beside its vector"
    assert np.array_equal(vectors, clustered(N, DIM, per_cluster=10)[::-1])
    manifest = read_manifest(saved)
    assert (manifest.encoder_id, manifest.last_seq, manifest.dim, manifest.size) == (
        "enc",
        42,
        DIM,
        N,
    )
    assert json.loads((saved / "manifest.json").read_text())["format_version"] == 1


def test_any_flipped_byte_is_noticed_and_faiss_never_sees_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the manifest, where a flip may change a digit of a measured value and nothing else."""
    random = np.random.default_rng(0)
    read: list[Any] = []
    revive = kinds.revive
    monkeypatch.setattr(
        "clipkit.index.vector_index.revive", lambda *a: read.append(1) or revive(*a)
    )
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        positions = {0, 7, len(whole) - 1, *random.integers(0, len(whole), 60).tolist()}
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            read.clear()
            with pytest.raises(IndexDamaged, match=path.name):
                VectorIndex.load(saved)
            assert not (read and path.name == "candidates.faiss")
        path.write_bytes(whole)
    VectorIndex.load(saved)


def test_missing_truncated_and_longer_files_are_named(saved: Path) -> None:
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        for other in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(other)
            with pytest.raises(IndexDamaged, match=f"{path.name}.* is not what was written"):
                VectorIndex.load(saved)
        path.unlink()
        with pytest.raises(IndexDamaged, match=f"{path.name} cannot be read"):
            VectorIndex.load(saved)
        path.write_bytes(whole)
    shutil.rmtree(saved)
    with pytest.raises(IndexDamaged, match=r"manifest.json cannot be read .*clipkit index"):
        read_manifest(saved)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"checksum": 1}', "[" * 5000, "\xff"])
def test_a_manifest_of_anything_else_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IndexDamaged, match="is not what was written"):
        read_manifest(tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "1", {}, {"format_version": 2})
    with pytest.raises(IndexDamaged, match="index format 2; this clipkit reads 1"):
        read_manifest(tmp_path / "1")


def test_an_existing_snapshot_is_never_written_over(index: VectorIndex, saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(InputError, match=r"000007 exists; snapshots are never overwritten"):
        index.save(saved, encoder_id="other", last_seq=43)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """The second file cannot be produced: neither the folder nor a half one is there."""

    def pieces() -> Any:
        yield b"begun"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "new", {"a": [b"whole"], "b": pieces()}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_runs_temporary_folder_does_no_harm(index: VectorIndex, saved: Path) -> None:
    for left in saved.parent.glob("*"):
        shutil.copytree(left, left.with_name(".000008.1-1.tmp"))
    index.save(saved.with_name("000008"), encoder_id="enc", last_seq=50)
    assert read_manifest(saved.with_name("000008")).last_seq == 50


def test_an_array_is_written_as_its_bytes_and_an_empty_one_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "1", {"a": [np.arange(3, dtype="<u2"), np.empty((0, 4)), b"z"]}, {})
    assert (tmp_path / "1" / "a").read_bytes() == b"\0\0\1\0\2\0z"
