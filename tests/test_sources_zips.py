"""Zips of pictures, and the roles of folders: splits, classes, or neither."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from data_samples import picture, rows_of, save_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.errors import DatasetError, ImageError
from clipkit.images import Limits
from clipkit.sources import Broken, Options, Row, ZipMember, open_source
from clipkit.sources.folders import FolderRoles
from data_prep.build import build, build_once
from data_prep.clean import Rules


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 48, 40).save(buffer, "JPEG")
    return buffer.getvalue()


def zip_of(path: Path, *names: str, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for seed, name in enumerate(names):
            archive.writestr(name, jpeg(seed))
    return path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # (split, label) of each picture in turn
        ("cat/1.jpg dog/2.jpg", "-/cat -/dog"),
        ("cat/old/1.jpg dog/2.jpg", "-/cat -/dog"),  # at any depth
        ("all/cat/1.jpg all/dog/2.jpg", "-/cat -/dog"),  # in a folder that holds everything
        ("train/cat/1.jpg train/dog/2.jpg test/cat/3.jpg", "train/cat train/dog test/cat"),
        ("train/cat/1.jpg train/dog/2.jpg", "train/cat train/dog"),
        ("x/train/1.jpg x/val/2.jpg", "train/- validation/-"),
        ("train/1.jpg bus/2.jpg car/3.jpg", "-/train -/bus -/car"),
        ("cat/1.jpg dog/2.jpg 3.jpg", "-/- -/- -/-"),  # one lies beside the folders
        ("cat/1.jpg cat/2.jpg", "-/- -/-"),  # one folder is no classes
        ("1.jpg 2.jpg", "-/- -/-"),
        ("train/cat/1.jpg val/dog/2.jpg more/3.jpg", "train/- validation/- -/-"),
        ("train/cat/1.jpg train/dog/2.jpg test/3.jpg", "train/- train/- test/-"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_are_splits_and_classes(
    tmp_path: Path, names: str, expected: str, packed: bool
) -> None:
    if packed:
        source = open_source(zip_of(tmp_path / "in.zip", *names.split()))
    else:
        save_all(tmp_path / "in", *names.split())
        source = open_source(tmp_path / "in", kind="folder")
    rows = [row for row in source.rows() if isinstance(row, Row)]
    found = {row.name: f"{row.split or '-'}/{row.label or '-'}" for row in rows}
    assert found == dict(zip(names.split(), expected.split(), strict=True))
    labels = {row.label for row in rows} - {None}
    assert source.classes == (tuple(sorted(labels)) if labels else None)
    told = f"{len(names.split())} pictures in {len(labels)} class folders"
    assert (told in source.description) is bool(labels)


@given(st.lists(st.text("ab.", min_size=1, max_size=3).map(str), max_size=6), st.data())
def test_roles_hold_for_any_tree(names: list[str], data: st.DataObject) -> None:
    """Every picture has a class or none has, and all classes occur."""
    folders = st.lists(st.sampled_from([*names, "train", "test", "x"]), max_size=4)
    paths = [
        PurePosixPath(*data.draw(folders), "1.jpg") for _ in range(data.draw(st.integers(0, 6)))
    ]
    roles = FolderRoles.of(paths)
    told = [roles.split_and_label(path) for path in paths]
    labels = {label for _, label in told}
    assert labels == set(roles.classes or ([None] if paths else ()))
    assert {split for split, _ in told} <= {None, "train", "test"}


def test_a_zip_is_read_where_it_lies(tmp_path: Path) -> None:
    """Stored and deflated, sorted by name; what is hidden and what is no picture are left out."""
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dog/b.jpg", jpeg(1), zipfile.ZIP_DEFLATED)
        archive.writestr("cat/a.jpg", jpeg(0), zipfile.ZIP_STORED)
        archive.writestr("cat/", b"")
        archive.writestr("__MACOSX/cat/._a.jpg", b"x")
        archive.writestr(".x/a.jpg", b"x")
        archive.writestr("cat/a.txt", b"A cat")
    source = open_source(path)
    assert source.kind == "zip" and source.total == 2
    assert source.description == (
        "zip of 2 pictures in 2 class folders, no captions; 1 other files are not read: unpack it if "
        "they are captions"
    )
    rows = [row for row in source.rows() if isinstance(row, Row)]
    assert [(row.name, row.label) for row in rows] == [("cat/a.jpg", "cat"), ("dog/b.jpg", "dog")]
    assert [row.picture.read() for row in rows] == [jpeg(0), jpeg(1)]
    with pytest.raises(ImageError):
        rows[1].picture.read(Limits(max_megabytes=0.0001))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zip"]


def test_what_a_zip_cannot_give(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no zip at all")
    with pytest.raises(DatasetError, match=r"no\.zip is no whole zip: File is not a zip file"):
        open_source(tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t.csv", "image,caption")
    with pytest.raises(DatasetError, match="holds no pictures among its 1 files; unpack it"):
        open_source(tmp_path / "t.zip")
    rare = zip_of(tmp_path / "rare.zip", "a.jpg", method=zipfile.ZIP_LZMA)
    (row,) = rows_of(rare)
    assert isinstance(row, Broken) and (row.place, row.reason) == ("a.jpg", "compression")
    # A password is a flag of the entry in the index, behind 8 bytes of signature and versions.
    locked = bytearray(zip_of(tmp_path / "locked.zip", "a.jpg").read_bytes())
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    (row,) = rows_of(tmp_path / "locked.zip")
    assert isinstance(row, Broken) and row.reason == "encrypted"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12), st.integers(0, 9)
)
def test_a_damaged_zip_gives_its_pictures_or_an_error_of_ours(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    """Bytes changed anywhere, the end cut off: what is read is what was packed."""
    path = tmp_path / "x.zip"
    data = bytearray(zip_of(path, "cat/a.jpg", "dog/b.jpg").read_bytes())
    for place, byte in changes:
        data[-1 - place % len(data)] = byte
    path.write_bytes(data[: len(data) - cut])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = rows_of(path)
    except DatasetError:
        return
    for row in rows:
        if isinstance(row, Row):
            assert isinstance(row.picture, ZipMember)
            try:
                content = row.picture.read()
            except ImageError:
                continue
            assert content in (jpeg(0), jpeg(1), b"")


def test_a_zip_builds_like_its_folder(tmp_path: Path) -> None:
    names = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    path = zip_of(tmp_path / "in.zip", *names)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "in")
    rules = Rules(uncaptioned="keep")
    packed = build([open_source(path)], tmp_path / "a", rules=rules)
    folder = build([open_source(tmp_path / "in")], tmp_path / "b", rules=rules)
    assert packed.fingerprint == folder.fingerprint and packed.labels == {"cat": 2, "dog": 2}


def test_build_once_for_methods_that_need_no_captions(tmp_path: Path) -> None:
    """A folder of its own, as the same source with its captions gives another dataset; a renamed class
    is another dataset, too."""
    save_all(tmp_path / "in", "cat/1.png", "dog/2.png", "dog/3.png")
    (tmp_path / "in" / "cat" / "1.txt").write_text("A cat")
    data = str(tmp_path / "in")
    folder, built = build_once(data, tmp_path / "made", uncaptioned=True)
    assert built is not None and (built.uncaptioned, built.labels) == (2, {"dog": 2, "cat": 1})
    assert folder.name.startswith("in-uncaptioned-")
    assert build_once(data, tmp_path / "made", uncaptioned=True) == (folder, None)
    captioned, with_captions = build_once(data, tmp_path / "made")
    assert with_captions is not None and with_captions.uncaptioned == 0
    assert captioned != folder and sum(with_captions.pictures.values()) == 1
    table = tmp_path / "t.csv"
    table.write_text("image,label\nin/cat/1.png,cat\nin/dog/2.png,dog\n")
    first, _ = build_once(str(table), tmp_path / "made", uncaptioned=True)
    table.write_text("image,label\nin/cat/1.png,cat\nin/dog/2.png,fox\n")
    second, _ = build_once(str(table), tmp_path / "made", uncaptioned=True)
    assert first != second
    zipped = zip_of(tmp_path / "x.zip", "cat/1.jpg", "dog/2.jpg")
    third, _ = build_once(str(zipped), tmp_path / "made", uncaptioned=True)
    zip_of(tmp_path / "x.zip", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg")
    fourth, again = build_once(str(zipped), tmp_path / "made", uncaptioned=True)
    assert third != fourth and again is not None and again.labels == {"dog": 2, "cat": 1}
    labels = {
        row.label
        for split in ("train", "validation", "test")
        if (fourth / split).is_dir()
        for row in open_source(fourth / split, options=Options(indexed=True)).rows()
        if isinstance(row, Row)
    }
    assert labels == {"cat", "dog"}
