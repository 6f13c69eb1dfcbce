"""A dataset built: whole or not at all, nothing dropped in silence, loadable by others."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_samples import picture, read_dataset, save, save_all
from PIL import Image

from clipkit.errors import DatasetError, InputError
from clipkit.images import image_id
from clipkit.sources import Broken, Options, PictureBytes, Row, Source, open_source
from data_prep.build import Built, Progress, build
from data_prep.clean import Rules
from data_prep.split import Fractions

HALVES = Fractions(0.25, 0.25)


def table(path: Path, *rows: tuple[str, ...], header: str = "image,caption") -> Path:
    quoted = (",".join(f'"{cell}"' for cell in row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *quoted]) + "\n", encoding="utf-8")
    return path


def run(out: Path, *paths: Path, **options: Any) -> Built:
    return build([open_source(path) for path in paths], out, **options)


def rejected(out: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(line["row"], line["what"], line["reason"]) for line in lines]


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Rows of every kind of trouble; what remains is a (3 captions, by two files) and b."""
    folder = tmp_path / "in"
    save_all(folder, "a.png", "b.png", "c.png")
    (folder / "a again.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    picture(7, 20, 90).save(folder / "small.png")
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    return table(
        folder / "t.csv",
        ("a.png", "A dog &amp; a cat"),  # line 2
        ("a.png", "Pets"),
        ("b.png", "Öl auf Leinwand"),
        ("a again.png", "A third caption"),
        ("a again.png", "pets."),  # line 6: but for case and stop, said already
        ("broken.jpg", "Lost"),
        ("broken.jpg", "Lost again"),
        ("small.png", "Tiny"),
        ("white.png", "White"),  # line 10
        ("gone.png", "Gone"),
        ("c.png", "IMG_0001.JPG"),
        ("c.png", ""),
        ("b.png", "too", "many"),
    )


def test_what_is_kept_and_what_is_rejected(messy: Path, tmp_path: Path) -> None:
    """Every row, picture and caption that is not in the dataset is in rejected.jsonl."""
    built = run(tmp_path / "out", messy)
    records = {r.captions: r for r in read_dataset(tmp_path / "out")}
    assert set(records) == {("A dog & a cat", "Pets", "A third caption"), ("Öl auf Leinwand",)}
    assert sorted(rejected(tmp_path / "out")) == sorted(
        [
            ("line 5", "picture", "duplicate"),
            ("line 7", "picture", "truncated"),
            ("line 8", "picture", "truncated"),
            ("line 9", "picture", "too-small"),
            ("line 10", "picture", "blank"),
            ("line 11", "row", "missing"),
            ("line 12", "caption", "file-name"),
            ("line 13", "caption", "empty"),
            ("line 14", "row", "wrong-field-count"),
            ("line 6", "caption", "repeated"),
            ("line 12", "picture", "no-caption"),
        ]
    )
    assert built.rows == 13 and built.captions == 4 and built.mended == {"HTML": 1}
    assert sum(built.pictures.values()) == 2
    assert built.rejected["picture"] == {
        "truncated": 2,
        "duplicate": 1,
        "too-small": 1,
        "blank": 1,
        "no-caption": 1,
    }
    for record in records.values():
        file = tmp_path / "out" / record.path
        assert image_id(file.read_bytes()) == record.image_id == file.stem
        assert record.meta["source"] in ("t.csv, line 2", "t.csv, line 4")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["counts"]["rejected"]["caption"] == {"file-name": 1, "empty": 1, "repeated": 1}
    assert manifest["fingerprint"] == built.fingerprint
    assert manifest["sources"][0]["description"].endswith(
        "pictures from 'image', captions from 'caption'"
    )


def test_pictures_are_links_and_the_folder_is_clean(messy: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", messy)
    inodes = {os.stat(p).st_ino for p in (tmp_path / "out").rglob("*.png")}
    assert inodes <= {os.stat(p).st_ino for p in messy.parent.iterdir()} and len(inodes) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {
        "dataset.json",
        "rejected.jsonl",
        "train",
        "validation",
        "test",
    }


def many(folder: Path, count: int, **columns: str) -> Path:
    """`count` pictures, every second with more said of it."""
    names = [f"{n:03}.png" for n in range(count)]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, 48, 40).save(folder / name)
    lines = [
        json.dumps({"image": name, "captions": [f"Thing {n}"]} | (columns if n % 2 else {})) + "\n"
        for n, name in enumerate(names)
    ]
    (folder / "t.jsonl").write_text("".join(lines))
    return folder / "t.jsonl"


def test_the_datasets_library_loads_it_as_it_stands(tmp_path: Path) -> None:
    """Columns that some rows, or one split only, would have: numbers, dates, nulls, tags, and a name
    that the library would take for a picture's. Arrow finds one type per column per split; differing
    ones are an error there."""
    datasets = pytest.importorskip("datasets")
    path = many(tmp_path / "in", 12)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for n, line in enumerate(lines):
        line["split"] = "train" if n < 8 else "test"
        if n == 9:
            line |= {"keywords": ["2019-01-01"], "year": 7, "thumb_file_name": "x.png", "a": None}
        if n == 2:
            line |= {"taken": "2019-01-01", "year": "unknown", "a": [1, {"b": 2}]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = tmp_path / "in" / "corrections.jsonl"
    wrong.write_text(json.dumps({"picture": "003.png", "query": "a cat", "right": False}) + "\n")
    run(tmp_path / "test out", path, wrong)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "test out"), cache_dir=str(tmp_path / "cache")
    )
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 8, "test": 4}
    ours = {r.image_id: r for r in read_dataset(tmp_path / "test out")}
    assert len(ours) == 12
    for rows in loaded.values():
        for row in rows:
            record = ours[row["image_id"]]
            assert tuple(row["captions"]) == record.captions
            assert row["image"].size == (48, 40) == (row["width"], row["height"])
            assert row["meta"] == record.meta["meta"]
    (said,) = [r for r in ours.values() if any(r.meta["not_captions"])]
    assert said.captions == ("Thing 3",) and said.meta["not_captions"] == ["a cat"]


def test_building_from_a_built_one_changes_nothing(tmp_path: Path) -> None:
    """Splits, captions and meta come through a second build; so does the fingerprint."""
    path = many(tmp_path / "in", 12, mood="calm", keywords="a, b")
    first = run(tmp_path / "one", path, fractions=HALVES)
    second = run(tmp_path / "two", tmp_path / "one", fractions=Fractions(0, 0))
    assert first.fingerprint == second.fingerprint and first.pictures == second.pictures
    records = {r.image_id: r for r in read_dataset(tmp_path / "one")}
    for record in read_dataset(tmp_path / "two"):
        assert record.meta["meta"] == records[record.image_id].meta["meta"]
        assert [t for t in record.meta["keywords"] if t] in ([], ["a", "b"])


def test_added_data_moves_no_picture(tmp_path: Path) -> None:
    path = many(tmp_path / "in", 40)
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    path.write_text("".join(lines[:20]))
    run(tmp_path / "half", path, fractions=HALVES)
    path.write_text("".join(lines))
    run(tmp_path / "whole", path, fractions=HALVES)
    whole = {r.image_id: r.split for r in read_dataset(tmp_path / "whole")}
    half = {r.image_id: r.split for r in read_dataset(tmp_path / "half")}
    assert len(half) == 20 and len(whole) == 40 and len(set(half.values())) == 3
    assert all(whole[image_id] == split for image_id, split in half.items())


def _look_alikes(folder: Path) -> Path:
    """Ten pictures and a worse copy of each."""
    rows = []
    for n in range(10):
        save(folder / f"{n}.png", n)
        save(folder / f"{n}.jpg", n, quality=70)
        rows += [(f"{n}.png", f"Thing {n}"), (f"{n}.jpg", f"Copy of {n}")]
    return table(folder / "t.csv", *rows)


def test_look_alikes_stay_in_one_split(tmp_path: Path) -> None:
    path = _look_alikes(tmp_path / "in")
    built = run(tmp_path / "out", path, fractions=HALVES)
    assert built.groups == 10 and built.parted == 0 and sum(built.pictures.values()) == 20
    splits: dict[str, set[str | None]] = {}
    for record in read_dataset(tmp_path / "out"):
        splits.setdefault(record.captions[0][-1], set()).add(record.split)
    assert all(len(of_one) == 1 for of_one in splits.values())
    # The test sees what it is for: left to themselves, some pairs would part.
    parted = run(tmp_path / "parted", path, fractions=HALVES, rules=Rules(near="ignore"))
    assert parted.groups == 0
    placed: dict[str, set[str | None]] = {}
    for record in read_dataset(tmp_path / "parted"):
        placed.setdefault(record.captions[0][-1], set()).add(record.split)
    assert any(len(of_one) > 1 for of_one in placed.values())


def test_look_alikes_can_be_dropped_and_are_listed(tmp_path: Path) -> None:
    built = run(tmp_path / "out", _look_alikes(tmp_path / "in"), rules=Rules(near="drop"))
    captions = [r.captions[0] for r in read_dataset(tmp_path / "out")]
    assert sorted(captions) == [f"Thing {n}" for n in range(10)]
    assert built.rejected == {"picture": {"near-duplicate": 10}}


def test_a_file_in_two_official_splits_is_tested_on(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", 0)
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes())
    save(tmp_path / "in" / "c.png", 1)
    rows = [("a.png", "One", "test"), ("b.png", "Two", "train"), ("c.png", "Three", "train")]
    path = table(tmp_path / "in" / "t.csv", *rows, header="image,caption,split")
    run(tmp_path / "out", path)
    assert {(r.captions, r.split) for r in read_dataset(tmp_path / "out")} == {
        (("One", "Two"), "test"),
        (("Three",), "train"),
    }


def test_official_splits_that_part_look_alikes_are_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    save(tmp_path / "a.jpg", 0, quality=70)
    rows = [("a.png", "One", "test"), ("a.jpg", "Two", "train")]
    path = table(tmp_path / "t.csv", *rows, header="image,caption,split")
    built = run(tmp_path / "out", path)
    assert (built.groups, built.parted) == (1, 1) and built.pictures == {"train": 1, "test": 1}
    dropped = run(tmp_path / "dropped", path, rules=Rules(near="drop"))
    assert dropped.parted == 0 and dropped.pictures == {"test": 1}


def test_captions_on_many_pictures(tmp_path: Path) -> None:
    save_all(tmp_path / "in", *(f"{n}.png" for n in range(4)))
    rows = [(f"{n}.png", said) for n in range(4) for said in ("Stock photo", f"Thing {n}")]
    path = table(tmp_path / "in" / "t.csv", *rows)
    built = run(tmp_path / "out", path, rules=Rules(max_repeats=3))
    assert built.captions == 4 and built.rejected == {"caption": {"repeated-on-many": 4}}
    assert run(tmp_path / "four", path, rules=Rules(max_repeats=4)).captions == 8
    assert run(tmp_path / "off", path, rules=Rules(max_repeats=0)).captions == 8


def test_corrections_on_top_of_captions(tmp_path: Path) -> None:
    """A right query is one caption more; a wrong one takes the caption away and is remembered."""
    save_all(tmp_path / "in", "a.png", "b.png")
    path = table(
        tmp_path / "in" / "t.csv", ("a.png", "A cat"), ("a.png", "A pet"), ("b.png", "Fog")
    )
    said = [("a.png", "a cat", False), ("b.png", "Grey morning", True), ("b.png", "Sun", False)]
    lines = [json.dumps({"picture": p, "query": q, "right": r}) + "\n" for p, q, r in said]
    (tmp_path / "in" / "corrections.jsonl").write_text("".join(lines))
    built = run(tmp_path / "out", path, tmp_path / "in" / "corrections.jsonl")
    records = {
        r.captions: list(filter(None, r.meta["not_captions"])) for r in read_dataset(built.folder)
    }
    assert records == {("A pet",): ["a cat"], ("Fog", "Grey morning"): ["Sun"]}
    assert built.rejected == {"caption": {"marked-wrong": 1}}
    kept = run(
        tmp_path / "kept",
        path,
        tmp_path / "in" / "corrections.jsonl",
        rules=Rules(allow=frozenset({"marked-wrong"})),
    )
    assert kept.captions == 4


def test_resized_pictures(tmp_path: Path) -> None:
    """The shorter side 32; what is smaller stays the file it is; identity is that of the source."""
    picture(0, 120, 80).save(tmp_path / "a.png")
    picture(1, 40, 33).save(tmp_path / "b.png")
    picture(2, 32, 32).save(tmp_path / "c.gif")
    path = table(tmp_path / "t.csv", ("a.png", "One"), ("b.png", "Two"), ("c.gif", "Three"))
    run(tmp_path / "out", path, resize=32)
    found = {r.captions[0]: r for r in read_dataset(tmp_path / "out")}
    sizes = {}
    for caption, record in found.items():
        with Image.open(tmp_path / "out" / record.path) as image:
            sizes[caption] = (image.format, image.size)
            assert image.size == (record.meta["width"], record.meta["height"])
    assert sizes == {
        "One": ("JPEG", (48, 32)),
        "Two": ("JPEG", (39, 32)),
        "Three": ("GIF", (32, 32)),
    }
    assert found["One"].image_id == image_id((tmp_path / "a.png").read_bytes())
    with pytest.raises(InputError, match="--resize is 8; the minimum is 16"):
        run(tmp_path / "no", path, resize=8)


def test_shards_are_img2datasets(tmp_path: Path) -> None:
    """Keys of five and four digits, JPEG whatever came in, the first caption in .txt, all in .json."""
    path = many(tmp_path / "in", 5)
    more = tmp_path / "in" / "more.csv"
    table(more, ("000.png", "Another word"))
    built = run(tmp_path / "out", path, more, shards=True, fractions=Fractions(0, 0))
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        bodies = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    keys = [f"00000{n:04}" for n in range(5)]
    assert list(bodies) == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt", "json")]
    assert bodies["000000000.txt"] == b"Thing 0"
    told = json.loads(bodies["000000000.json"])
    assert told["captions"] == ["Thing 0", "Another word"] and told["key"] == "000000000"
    assert told["image_id"] == image_id((tmp_path / "in" / "000.png").read_bytes())
    assert Image.open(io.BytesIO(bodies["000000000.jpg"])).format == "JPEG"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "rejected.jsonl",
        "train",
    ]
    # and read again: splits from the folders, all captions
    again = run(tmp_path / "again", tmp_path / "out", fractions=HALVES)
    assert again.captions == built.captions == 6 and again.pictures == {"train": 5}


def test_an_existing_folder_is_not_touched_unless_asked(messy: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", messy)
    with pytest.raises(InputError, match=r"out exists already; give --overwrite"):
        run(tmp_path / "out", messy)
    before = (tmp_path / "out" / "dataset.json").read_text()
    run(tmp_path / "out", messy, overwrite=True, seed=4)
    assert (tmp_path / "out" / "dataset.json").read_text() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="mine exists and is not a clipkit dataset"):
        run(tmp_path / "mine", messy, overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(InputError, match="lies inside the pictures' folder"):
        build([open_source(messy.parent, kind="folder")], messy.parent / "out")
    with pytest.raises(InputError, match="nothing to build from"):
        build([], tmp_path / "x")


@pytest.mark.parametrize("phase", ["reading", "comparing", "writing"])
def test_an_interrupted_build_leaves_what_was(messy: Path, tmp_path: Path, phase: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    run(tmp_path / "out", messy)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", messy, overwrite=True, seed=9, on_progress=interrupt)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "new", messy, on_progress=interrupt)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_a_sentence(messy: Path, tmp_path: Path) -> None:
    def full(progress: Progress) -> None:
        if progress.phase == "writing":
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot build .*out: .*No space left on device"):
        run(tmp_path / "out", messy, on_progress=full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_leftovers_of_a_killed_build_go_and_a_living_one_is_respected(
    messy: Path, tmp_path: Path
) -> None:
    (tmp_path / ".out.building" / "pool").mkdir(parents=True)
    (tmp_path / ".out.building" / "spool.jsonl").write_text("half")

    def while_building(progress: Progress) -> None:
        if progress.phase == "comparing":
            with pytest.raises(InputError, match=r"another build is writing .*out"):
                run(tmp_path / "out", messy)

    run(tmp_path / "out", messy, on_progress=while_building)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_nothing_to_read_is_an_error_that_helps(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", ("a.png", "One"), ("b.png", "Two"))
    with pytest.raises(DatasetError, match=r"none of its 2 rows gives.*line 2: a\.png.*--pictures"):
        run(tmp_path / "out", path)
    save(tmp_path / "a.png", 0)
    table(path, ("a.png", "untitled"))
    with pytest.raises(
        DatasetError, match=r"no picture with a caption is left of 1.*placeholder 1"
    ):
        run(tmp_path / "out", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "t.csv"]


def test_sources_stream(tmp_path: Path) -> None:
    """No more than a few dozen rows ahead of what is taken: a source may be larger than memory."""
    ahead = Counter[str]()
    most = 0

    def rows() -> Iterator[Row | Broken]:
        nonlocal most
        buffer = io.BytesIO()
        for n in range(150):
            buffer.seek(0)
            picture(n, 40, 40).save(buffer, "PNG")
            ahead["out"] += 1
            most = max(most, ahead["out"] - ahead["taken"])
            yield Row(PictureBytes(buffer.getvalue()), str(n), f"row {n}", (f"Thing {n}",))

    def taken(progress: Progress) -> None:
        if progress.phase == "reading":
            ahead["taken"] = progress.done

    source = Source("made", "made", "made here", None, rows)
    built = build([source], tmp_path / "out", workers=2, on_progress=taken)
    assert sum(built.pictures.values()) == 150
    assert most <= 4 * 2 + 16 + 2


def test_progress_tells_what_is_done_of_what(messy: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(tmp_path / "out", messy, on_progress=seen.append)
    assert [p.done for p in seen if p.phase == "reading"] == list(range(1, 14))
    assert seen[-1].phase == "writing" and seen[-1].done == seen[-1].total == 3
    assert seen[-1].rejected == 11


def test_heic_and_symbolic_links(tmp_path: Path) -> None:
    """What the datasets library cannot open becomes a JPEG; a link gives the file it leads to."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(0)).save(tmp_path / "a.heic")
    save(tmp_path / "far" / "b.png", 1)
    (tmp_path / "b.png").symlink_to(tmp_path / "far" / "b.png")
    path = table(tmp_path / "t.csv", ("a.heic", "One"), ("b.png", "Two"))
    run(tmp_path / "out", path)
    files = {r.captions[0]: tmp_path / "out" / r.path for r in read_dataset(tmp_path / "out")}
    assert files["One"].suffix == ".jpg" and files["Two"].suffix == ".png"
    assert not files["Two"].is_symlink()


def test_odd_but_legal_options(tmp_path: Path) -> None:
    """Columns by name and pictures elsewhere reach the build."""
    save(tmp_path / "elsewhere" / "a.png", 0)
    path = table(tmp_path / "t.csv", ("a.png", "One", "Two"), header="x,y,z")
    source = open_source(path, options=Options("x", ("z",), tmp_path / "elsewhere"))
    build([source], tmp_path / "out")
    assert [r.captions for r in read_dataset(tmp_path / "out")] == [("Two",)]
