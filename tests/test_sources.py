"""Every kind of source from its real layout, in small."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_samples import picture, rows_of, save, save_all, told

from clipkit.errors import DatasetError
from clipkit.sources import (
    SOURCES,
    Broken,
    Options,
    PictureFile,
    Row,
    Source,
    detect,
    open_source,
    open_sources,
)
from data_prep.build import build_once
from eval.data import open_captioned


def jsonl(path: Path, *objects: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def test_a_folder_gives_its_sidecars_and_its_folders_names_the_splits(tmp_path: Path) -> None:
    save_all(tmp_path, "train/a.jpg", "val/b.png", "holiday/c.jpg", ".hidden/d.jpg")
    (tmp_path / "train" / "a.txt").write_text("A dog\nA wet dog\n")
    (tmp_path / "val" / "b.json").write_text('{"caption": "A cat", "tags": ["pet"]}')
    assert detect(tmp_path) == "folder"
    rows = rows_of(tmp_path)
    assert told(rows) == [
        ("holiday/c.jpg", (), None),
        ("train/a.jpg", ("A dog", "A wet dog"), "train"),
        ("val/b.png", ("A cat",), "validation"),
    ]
    assert isinstance(rows[2], Row) and rows[2].meta == {"keywords": ["pet"]}


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no pictures; looked for .*\.jpg"):
        open_source(tmp_path)


def test_jsonl_with_broken_lines_and_odd_names(tmp_path: Path) -> None:
    save_all(tmp_path / "images", "a.jpg", "b.jpg")
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"img_path": "images/a.jpg", "alt text": "A dog", "n": 1}\n'
        "\n"
        '{"img_path": "images/b.jpg", "alt text": ["A cat", "A pet"]}\n'
        "{broken\n"
        '["a list"]\n'
        '{"img_path": "images/b.jpg", "alt text": 7}\n'
        '{"img_path": "gone.jpg", "alt text": "x"}\n'
        '{"alt text": "no name"}\n'
        '{"img_path": "https://example.org/a.jpg", "alt text": "far"}\n'
    )
    assert detect(path) == "jsonl"
    rows = rows_of(path)
    assert told(rows) == [
        ("images/a.jpg", ("A dog",), None),
        ("images/b.jpg", ("A cat", "A pet"), None),
        ("line 4", "not-json"),
        ("line 5", "not-json"),
        ("line 6", "wrong-type"),
        ("line 7", "missing"),
        ("line 8", "no-picture-name"),
        ("line 9", "remote"),
    ]
    assert isinstance(rows[0], Row) and rows[0].meta == {"n": 1}


def test_a_key_that_begins_behind_the_sample_has_a_role_too(tmp_path: Path) -> None:
    """300 lines are more than the 200 that roles are chosen by; "caption" alone would lose the last."""
    save_all(tmp_path, "a.jpg")
    path = tmp_path / "pairs.jsonl"
    first = '{"image": "a.jpg", "caption": "A dog"}\n' * 300
    path.write_text(first + '{"image": "a.jpg", "captions": ["A cat", "A pet"]}\n')
    *_, last = rows_of(path)
    assert isinstance(last, Row) and last.captions == ("A cat", "A pet")


def test_tags_alone_are_enough(tmp_path: Path) -> None:
    """Retrieval can search by tags; what needs captions says so itself."""
    save_all(tmp_path, "a.jpg")
    path = tmp_path / "tags.jsonl"
    path.write_text('{"image": "a.jpg", "keywords": ["pet", "wet"]}\n')
    source = open_source(path)
    assert source.description == "pictures from 'image', no captions, tags from 'keywords'"
    (row,) = source.rows()
    assert isinstance(row, Row) and (row.captions, row.meta) == ((), {"keywords": ["pet", "wet"]})


def test_a_json_list_is_read_like_lines(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 0)
    (tmp_path / "pairs.json").write_text('[{"image": "a.jpg", "caption": "A dog"}, 7]')
    assert told(rows_of(tmp_path / "pairs.json")) == [
        ("a.jpg", ("A dog",), None),
        ("[1]", "not-json"),
    ]


def test_coco_captions(tmp_path: Path) -> None:
    """annotations/captions_val2017.json beside val2017/, as the archives unpack."""
    save_all(tmp_path / "val2017", "000000000139.jpg", "000000000285.jpg")
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    images = [
        {"license": 2, "file_name": "000000000139.jpg", "height": 426, "width": 640, "id": 139},
        {"license": 4, "file_name": "000000000285.jpg", "height": 640, "width": 586, "id": 285},
        {"license": 4, "file_name": "000000000999.jpg", "id": 999},
    ]
    notes: list[Any] = [
        {"image_id": 139, "id": 1, "caption": "A woman in a living room."},
        {"image_id": 285, "id": 2, "caption": "A big bear."},
        {"image_id": 139, "id": 3, "caption": "A room with chairs."},
        {"image_id": 12345, "id": 4, "caption": "Of nothing."},
        {"image_id": 285, "id": 5},
    ]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    assert detect(path) == "coco"
    assert told(rows_of(path)) == [
        ("000000000139.jpg", ("A woman in a living room.", "A room with chairs."), None),
        ("000000000285.jpg", ("A big bear.",), None),
        ("images[2]", "missing"),
        ("annotations[3]", "unknown-picture"),
        ("annotations[4]", "wrong-type"),
    ]


def test_karpathys_split_trains_on_restval(tmp_path: Path) -> None:
    save_all(tmp_path / "images" / "val2014", "a.jpg", "b.jpg", "c.jpg")
    sentences = [{"tokens": ["a"], "raw": "A dog.", "imgid": 0, "sentid": 0}]
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "split": s,
            "sentences": sentences,
            "cocoid": 1,
        }
        for n, s in (("a", "restval"), ("b", "val"), ("c", "test"))
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": [*images, {"filename": "d.jpg"}], "dataset": "coco"}))
    assert detect(path) == "karpathy"
    # "images/" is one of the usual folders; the path inside it is the file's own
    assert told(rows_of(path)) == [
        ("val2014/a.jpg", ("A dog.",), "train"),
        ("val2014/b.jpg", ("A dog.",), "validation"),
        ("val2014/c.jpg", ("A dog.",), "test"),
        ("images[3]", "wrong-type"),
    ]


def test_flickr8k_as_it_is_handed_out(tmp_path: Path) -> None:
    """Flickr8k_text/ and Flicker8k_Dataset/ (so spelt) side by side, with the known broken name."""
    save_all(tmp_path / "Flicker8k_Dataset", "10.jpg", "11.jpg", "12.jpg")
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    (text / "Flickr8k.token.txt").write_text(
        "10.jpg#0\tA child in a pink dress .\n10.jpg#1\tA girl .\n11.jpg#0\tA black dog .\n"
        "2258277193_586949ec62.jpg.1#0\tSomeone .\nno tab here\n12.jpg#0\tA cat .\n"
    )
    (text / "Flickr8k.lemma.token.txt").write_text("10.jpg#0\ta child\n")
    (text / "Flickr_8k.trainImages.txt").write_text("10.jpg\n")
    (text / "Flickr_8k.devImages.txt").write_text("11.jpg\n")
    (text / "Flickr_8k.testImages.txt").write_text("12.jpg\n")
    expected = [
        ("10.jpg", ("A child in a pink dress .", "A girl ."), "train"),
        ("11.jpg", ("A black dog .",), "validation"),
        ("line 4", "missing"),
        ("line 5", "no-tab"),
        ("12.jpg", ("A cat .",), "test"),
    ]
    for path in (text, text / "Flickr8k.token.txt"):
        assert detect(path) == "flickr"
        assert told(rows_of(path)) == expected


def test_flickr30k_with_lists_of_bare_numbers(tmp_path: Path) -> None:
    save_all(tmp_path / "flickr30k-images", "1000092795.jpg", "10002456.jpg")
    (tmp_path / "results_20130124.token").write_text(
        "1000092795.jpg#0\tTwo young guys .\n10002456.jpg#0\tSeveral men .\n"
    )
    (tmp_path / "train.txt").write_text("1000092795\n")
    (tmp_path / "test.txt").write_text("10002456\n")
    assert told(rows_of(tmp_path / "results_20130124.token")) == [
        ("1000092795.jpg", ("Two young guys .",), "train"),
        ("10002456.jpg", ("Several men .",), "test"),
    ]


def test_an_imagefolder_with_any_text_column(tmp_path: Path) -> None:
    save_all(tmp_path / "train", "a.jpg", "sub/b.jpg")
    save(tmp_path / "test" / "c.jpg", 5)
    jsonl(
        tmp_path / "train" / "metadata.jsonl",
        {"file_name": "a.jpg", "text": "A dog"},
        {"file_name": "sub/b.jpg", "text": "A cat"},
    )
    (tmp_path / "test" / "metadata.csv").write_text('file_name,text\nc.jpg,"A bird, far"\n')
    assert detect(tmp_path) == "imagefolder"
    rows = rows_of(tmp_path)
    assert told(rows) == [
        ("train/a.jpg", ("A dog",), "train"),
        ("train/sub/b.jpg", ("A cat",), "train"),
        ("test/c.jpg", ("A bird, far",), "test"),
    ]
    assert [r.place for r in rows] == ["train, line 1", "train, line 2", "test, line 2"]


def test_an_imagefolder_whose_meta_is_anothers(tmp_path: Path) -> None:
    """Columns called image_id and meta, in which no JSON object of clipkit's stands."""
    save(tmp_path / "train" / "a.jpg", 0)
    for meta in ("[1]", "{broken", 7, None):
        line = {"file_name": "a.jpg", "text": "A dog", "image_id": "1", "meta": meta}
        jsonl(tmp_path / "train" / "metadata.jsonl", line)
        (row,) = rows_of(tmp_path)
        assert isinstance(row, Row) and row.meta == {"image_id": "1", "meta": meta}


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    note = {"caption": "A dog", "url": "http://a", "key": "000000000", "status": "success"}
    _tar(
        tmp_path / "00000.tar",
        [
            ("000000000.jpg", _jpeg(0)),
            ("000000000.json", json.dumps(note).encode()),
            ("000000000.txt", b"A dog"),
            ("000000001.json", b'{"caption": "no picture"}'),
            ("000000002.jpg", _jpeg(2)),
            ("000000002.txt", b"A cat\nEine Katze"),
            ("000000003.jpg", _jpeg(3)),
            ("000000003.json", b"{broken"),
        ],
    )
    damaged = _tar(tmp_path / "00001.tar", [("000010000.jpg", _jpeg(4))])
    damaged.write_bytes(damaged.read_bytes()[:700])
    assert detect(tmp_path) == "webdataset"
    assert detect(tmp_path / "0000*.tar") == "webdataset"
    rows = rows_of(tmp_path)
    assert told(rows) == [
        ("00000/000000000", ("A dog",), None),
        ("00000.tar: 000000001", "no-picture"),
        ("00000/000000002", ("A cat", "Eine Katze"), None),
        ("00000.tar: 000000003", "not-json"),
        ("00001.tar", "damaged-shard"),
    ]
    assert isinstance(rows[0], Row)
    assert rows[0].picture.read() == _jpeg(0) and rows[0].meta == {"url": "http://a"}


def test_a_shard_with_dangerous_names_touches_nothing(tmp_path: Path) -> None:
    """Names that climb out, a link to the world, a device: read as a stream, nothing is written."""
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../escape.jpg", "/tmp/absolute-clipkit.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(_jpeg(1))
            tar.addfile(info, io.BytesIO(_jpeg(1)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        device = tarfile.TarInfo("device.jpg")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    before = sorted(tmp_path.rglob("*"))
    assert [row.place for row in rows_of(path)] == [
        "x.tar: ../../escape",
        "x.tar: /tmp/absolute-clipkit",
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/absolute-clipkit.jpg").exists()


def test_a_data_set_of_the_datasets_library(tmp_path: Path) -> None:
    """Saved to disk with two splits, an image feature and a class label; and as a Parquet file."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )

    def rows(seed: int) -> Any:
        columns = {
            "photo": [{"bytes": _jpeg(seed), "path": f"{seed}.jpg"}],
            "captions": [["A pet", "An animal"]],
            "label": [1],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    saved = datasets.DatasetDict({"train": rows(0), "test": rows(1)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert detect(tmp_path / "saved") == "hf"
    source = open_source(tmp_path / "saved")
    found = list(source.rows())
    assert told(found) == [
        ("0.jpg", ("A pet", "An animal"), "train"),
        ("1.jpg", ("A pet", "An animal"), "test"),
    ]
    assert source.total == 2
    assert isinstance(found[0], Row)
    assert found[0].picture.read() == _jpeg(0) and found[0].meta == {"label": "dog"}
    labelled = rows_of(tmp_path / "saved", options=Options(caption_columns=("label",)))
    assert told(labelled)[0] == ("0.jpg", ("dog",), "train")
    rows(2).to_parquet(str(tmp_path / "rows.parquet"))
    assert detect(tmp_path / "rows.parquet") == "hf"
    assert told(rows_of(tmp_path / "rows.parquet"))[0][1] == ("A pet", "An animal")


def test_an_unreachable_hub_is_one_sentence() -> None:
    with pytest.raises(
        DatasetError, match=r"hf:nobody/nothing could not be reached .*copy the folder"
    ) as e:
        open_source("hf:nobody/nothing")
    assert "\n" not in str(e.value)


def test_corrections_from_the_app(tmp_path: Path) -> None:
    save_all(tmp_path, "a.jpg", "b.jpg")
    path = jsonl(
        tmp_path / "corrections.jsonl",
        {"picture": str(tmp_path / "a.jpg"), "query": "a red car", "right": True},
        {"image": "b.jpg", "query": "a red car", "right": False},
        {"image": "b.jpg", "query": "a red car", "right": "yes"},
    )
    assert detect(path) == "corrections"
    rows = rows_of(path)
    assert told(rows) == [
        (str(tmp_path / "a.jpg"), ("a red car",), None),
        ("b.jpg", (), None),
        ("line 3", "wrong-type"),
    ]
    assert isinstance(rows[1], Row) and rows[1].meta == {"not_captions": ["a red car"]}


def test_pictures_are_found_by_folder_suffix_and_foreign_slashes(tmp_path: Path) -> None:
    save_all(tmp_path / "elsewhere", "deep/a.jpg", "b.png")
    path = jsonl(
        tmp_path / "t" / "p.jsonl",
        {"image": "deep\\a.jpg", "caption": "A dog"},
        {"image": "b", "caption": "A cat"},
        {"image": "nul\0.jpg", "caption": "A nul"},
    )
    rows = rows_of(path, options=Options(pictures=tmp_path / "elsewhere"))
    assert [r.picture.path if isinstance(r, Row) else "broken" for r in rows] == [
        tmp_path / "elsewhere" / "deep" / "a.jpg",
        tmp_path / "elsewhere" / "b.png",
        "broken",
    ]
    assert isinstance(rows[2], Broken) and rows[2].reason == "missing"
    with pytest.raises(DatasetError, match="nowhere is no folder"):
        open_source(path, options=Options(pictures=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{}", "neither COCO captions"),
        ("x.json", '{"a": 1}\n{"b": 2}', r"is not JSON.*name it \.jsonl"),
        ("x.jsonl", "[]\n", "holds no JSON objects"),
        (
            "x.dat",
            "x",
            r"cannot tell what .* as in table:x\.dat; there are classes, coco, corrections",
        ),
        ("x.jpg", "x", "is a single picture"),
        ("x.csv", "", "is empty"),
        ("x.csv", "no separators here\nat all\n", "has one column only"),
        ("x.csv", "image,caption\n", "has no rows"),
        ("x.tar", "not a tar", None),
    ],
)
def test_what_is_no_source_says_so(
    tmp_path: Path, name: str, content: str, message: str | None
) -> None:
    path = tmp_path / name
    path.write_text(content)
    if message is None:
        assert told(rows_of(path)) == [(name, "damaged-shard")]
        return
    with pytest.raises(DatasetError, match=message):
        open_source(path)


def test_names_tell_the_splits_only_together(tmp_path: Path) -> None:
    """A lone train.csv, as competitions hand out, must not leave nothing to validate on."""
    save(tmp_path / "a.jpg", 0)
    for name in ("train.csv", "captions_val2017.csv", "more.csv"):
        (tmp_path / name).write_text("image,caption\na.jpg,A dog\n")
    paths = [str(tmp_path / n) for n in ("train.csv", "captions_val2017.csv", "more.csv")]

    def splits(paths: list[str], options: Options | None = None) -> list[object]:
        sources = open_sources(paths, options=options)
        return [row.split for s in sources for row in s.rows() if isinstance(row, Row)]

    assert splits(paths) == ["train", "validation", None]
    assert splits(paths[:1]) == splits(paths[2:]) == [None]
    assert splits(paths, Options(split="test")) == ["test"] * 3


def test_what_is_not_there_and_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nobody/pets does not exist; .* write hf:nobody/pets"):
        open_source("nobody/pets")
    with pytest.raises(DatasetError, match=r"unknown kind 'jsnol'.*did you mean 'jsonl'\?"):
        open_source(tmp_path, kind="jsnol")
    assert sorted(SOURCES) == list(SOURCES)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path: Path) -> None:
    save(tmp_path / "far" / "b.png", 1)
    save(tmp_path / "in" / "a.png", 0)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "far")
    assert told(rows_of(tmp_path / "in")) == [
        ("a.png", (), None),
        ("loop", "symlink-loop"),
        ("other/b.png", (), None),
    ]


def test_a_folder_with_one_table_is_that_table(tmp_path: Path) -> None:
    """captions.jsonl beside the pictures, or a COCO file over images/; but not JSON of another kind,
    nor a list beside pictures that have captions of their own."""
    save_all(tmp_path / "a", "1.png", "2.png")
    jsonl(tmp_path / "a" / "captions.jsonl", {"picture": "1.png", "description": "A dog"})
    assert detect(tmp_path / "a") == "jsonl"
    assert told(rows_of(tmp_path / "a")) == [("1.png", ("A dog",), None)]
    save(tmp_path / "b" / "images" / "1.png", 0)
    coco = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": []}
    (tmp_path / "b" / "captions.json").write_text(json.dumps(coco))
    assert detect(tmp_path / "b") == "coco"
    assert told(rows_of(tmp_path / "b")) == [("1.png", (), None)]
    save(tmp_path / "c" / "1.png", 0)
    (tmp_path / "c" / "about.json").write_text('{"camera": "a phone"}')
    assert detect(tmp_path / "c") == "folder"
    (tmp_path / "c" / "1.txt").write_text("A cat")
    jsonl(tmp_path / "c" / "exif.jsonl", {"file": "1.png", "iso": 100})
    (tmp_path / "c" / "about.json").unlink()
    assert told(rows_of(tmp_path / "c")) == [("1.png", ("A cat",), None)]


def test_a_kind_that_is_registered_is_read_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader from outside: a file of `NAME = caption` lines, as KIND:PATH wherever data is named."""

    def open_equations(path: Path, _: Options) -> Source:
        def rows() -> Iterator[Row | Broken]:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                name, _, caption = line.partition(" = ")
                picture = PictureFile(path.parent / name)
                yield Row(picture, name, f"line {number}", (caption,))

        return Source("equations", str(path), "equations", None, rows)

    monkeypatch.setitem(SOURCES, "equations", open_equations)
    save(tmp_path / "a.png", 0)
    (tmp_path / "x.eq").write_text("a.png = A dog\n")
    name = f"equations:{tmp_path / 'x.eq'}"
    assert told(rows_of(name)) == [("a.png", ("A dog",), None)]
    assert open_captioned(name).captions == ("A dog",)
    folder, built = build_once(name, tmp_path / "built")
    assert built is not None and built.captions == 1
    assert build_once(name, tmp_path / "built") == (folder, None)
