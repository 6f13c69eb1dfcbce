"""Data in WebDataset shards and on the hub: as it lies there, and clear refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import save_all
from written import names, png, write, write_tar

from clipkit.errors import DatasetError, ImageError, InputError
from clipkit.sources import open_source
from data_prep.build import build_once
from eval.data import open_captioned, open_labelled

# ---- WebDataset


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": png(1),
            "000000000.json": b'{"caption": "one", "key": "000000000", "tags": ["t"]}',
            "000000000.txt": b"one",
            "000000001.json": b'{"caption": "lost", "status": "failed_to_download"}',
        },
    )
    write_tar(tmp_path / "00001.tar", {"000010000.txt": b"two\nthree\n", "000010000.png": png(2)})
    write_tar(tmp_path / "00002.tar", {"__MACOSX/x": b"", "000020000.webp": b"no caption"})
    data = open_captioned(str(tmp_path))
    assert names(data) == ["00000/000000000", "00001/000010000", "00002/000020000"]
    assert data.captions == ("one", "two", "three")
    assert data.owner.tolist() == [0, 1, 1]
    assert data.tags == (("t",), (), ())
    (warning,) = data.warnings
    assert (
        "1 row without a picture, left out;" in warning
        and "the first: 00000.tar: 000000001: only json" in warning
    )
    assert [data.pictures.read(row) for row in range(3)] == [png(1), png(2), b"no caption"]
    assert open_captioned(str(tmp_path / "0000[01].tar")).captions == data.captions
    assert open_captioned(str(tmp_path / "00001.tar")).captions == ("two", "three")
    with pytest.raises(InputError, match="nothing matches"):
        open_captioned(str(tmp_path / "*.zip"))
    with pytest.raises(InputError, match="has no splits, so none called 'test'; leave out --split"):
        open_captioned(str(tmp_path / "*.tar"), split="test")


def test_shards_with_classes(tmp_path: Path) -> None:
    """The layout of clip-benchmark's repositories, as downloaded."""
    write(tmp_path / "classnames.txt", "cat\ndog\n")
    write_tar(
        tmp_path / "test" / "0.tar",
        {"s0.png": png(0), "s0.cls": b"1", "s1.png": png(1), "s1.cls": b"0\n"},
    )
    write_tar(tmp_path / "train" / "0.tar", {"s0.png": png(0), "s0.cls": b"1"})
    data = open_labelled(str(tmp_path))
    assert (data.split, data.classes) == ("test", ("cat", "dog"))
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]
    assert open_labelled(str(tmp_path / "test" / "*.tar")).classes == ("cat", "dog")
    assert open_labelled(str(tmp_path), classes=["Katze", "Hund"]).classes == ("Katze", "Hund")
    with pytest.raises(InputError, match=r"3 classes were given, but .* has 2"):
        open_labelled(str(tmp_path), classes=["a", "b", "c"])


def test_shards_with_several_classes_a_picture(tmp_path: Path) -> None:
    """clip-benchmark's voc2007_multilabel; arrays of objects, which would be unpickled, are refused."""
    write(tmp_path / "classnames.txt", "cat\ndog\nsea\n")

    def npy(values: Any) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(values), allow_pickle=True)
        return buffer.getvalue()

    shard = tmp_path / "test" / "0.tar"
    write_tar(shard, {"s0.png": png(0), "s0.npy": npy([1, 0, 1])})
    data = open_labelled(str(tmp_path))
    assert data.targets is not None
    assert data.targets.tolist() == [[True, False, True]]
    write_tar(shard, {"s0.png": png(0), "s0.npy": npy([{"a": 1}, None])})
    with pytest.raises(DatasetError, match=r"0\.tar: s0: its \.cls or \.npy: .*allow_pickle=False"):
        open_labelled(str(tmp_path))


def test_damaged_shards_are_errors(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {"1.png": png(1), "1.txt": b"one"}).read_bytes()
    data = open_captioned(str(tmp_path / "a.tar"))
    write(tmp_path / "a.tar", whole[:520])  # cut after it was opened: the header's 512 and a bit
    with pytest.raises(ImageError, match="ends inside"):
        data.pictures.read(0)
    with pytest.raises(DatasetError, match=r"/a\.tar: not a whole tar \(unexpected end of data\)"):
        open_captioned(str(tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", {"1.png": png(1)}, mode="w:gz")
    with pytest.raises(DatasetError, match=r"not an uncompressed tar, so .* unpack it with gunzip"):
        open_captioned(str(tmp_path / "b.tar"))
    write_tar(tmp_path / "c.tar", {"1.txt": b"one"})
    with pytest.raises(
        DatasetError, match=r"none of its 1 rows gives a picture; .*only txt under this name"
    ):
        open_captioned(str(tmp_path / "c.tar"))


# ---- the hub


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"cifar1O does not exist; did you mean the benchmark cifar10\?"
    ):
        open_labelled("cifar1O")


@pytest.mark.parametrize(
    "name", ["cifar10", "wds/vtab/cifar10", "hf:clip-benchmark/wds_vtab-cifar10"]
)
def test_an_unreachable_benchmark_is_one_sentence(name: str) -> None:
    with pytest.raises(InputError) as refused:
        open_labelled(name)
    said = str(refused.value)
    assert said.startswith(f"{name} could not be reached (")
    assert "`hf download clip-benchmark/wds_vtab-cifar10 --repo-type dataset" in said
    assert said.endswith("copy the folder to this machine and name it instead")
    assert "\n" not in said and len(said) < 500


def test_an_unreachable_dataset_is_one_sentence() -> None:
    with pytest.raises(
        InputError, match=r"^hf:a/b could not be reached .*`hf download a/b .* name it instead$"
    ):
        open_captioned("hf:a/b")


@pytest.mark.parametrize("name", ["hf:a/b/config", "hf:a/b:config"])
def test_a_config_is_written_with_a_slash_and_understood_with_a_colon(name: str) -> None:
    for attempt in (open_captioned, open_labelled, open_source):
        with pytest.raises(InputError, match=rf"^{name} could not be .*`hf download a/b --repo"):
            attempt(name)
    with pytest.raises(InputError, match="write hf:ORG/NAME or hf:ORG/NAME/CONFIG"):
        open_captioned("hf:a//b")


@pytest.fixture
def hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder as the hub holds it: parquet with pictures inside."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = datasets.Value("string")
    rows = {
        "image": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
        "label": [1, 0],
        "caption_0": ["a dog", "a cat"],
        "caption_1": ["a hound", None],
        "tags": [["animal"], []],
    }
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "caption_0": text,
        "caption_1": text,
        "tags": datasets.List(text),
    }
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    return f"hf:{tmp_path / 'set'}"


def test_a_hub_dataset(hub_dataset: str, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    capfd.readouterr()
    labelled = open_labelled(hub_dataset)
    assert (labelled.split, labelled.classes) == ("test", ("cat", "dog"))
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [1, 0]
    assert labelled.pictures.read(1) == png(2)
    assert names(labelled) == ["row 0", "row 1"]
    captioned = open_captioned(hub_dataset, split="train")
    assert captioned.captions == ("a dog", "a hound", "a cat")
    assert captioned.owner.tolist() == [0, 0, 1]
    assert captioned.tags == (("animal",), ())
    with pytest.raises(InputError, match="no split 'val'; it has train, test"):
        open_labelled(hub_dataset, split="val")
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert not datasets.are_progress_bars_disabled()


def test_shards_through_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"s0.png": png(0), "s0.cls": b"1", "s0.txt": b"one\ntwo", "s1.png": png(1)}
    write_tar(tmp_path / "set" / "test" / "0.tar", {**files, "s1.cls": b"0", "s1.txt": b"three"})
    captioned = open_captioned(f"hf:{tmp_path / 'set'}")
    assert captioned.captions == ("one", "two", "three")
    assert captioned.owner.tolist() == [0, 0, 1]
    labelled = open_labelled(f"hf:{tmp_path / 'set'}", classes=["cat", "dog"])
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [1, 0]


def test_a_benchmark_that_was_downloaded_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as huggingface_hub lays it out: by name, split and classes from there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "datasets--clip-benchmark--wds_vtab-cifar10"
    write(home / "refs" / "main", "c0ffee")
    write(home / "snapshots" / "c0ffee" / "classnames.txt", "airplane\nautomobile\n")
    write_tar(home / "snapshots" / "c0ffee" / "test" / "0.tar", {"s0.webp": png(0), "s0.cls": b"1"})
    data = open_labelled("cifar10")
    assert (data.name, data.split, data.classes) == ("cifar10", "test", ("airplane", "automobile"))
    assert data.labels is not None
    assert data.labels.tolist() == [1]
    with pytest.raises(InputError, match="cifar10 has no split 'train'; try test or train"):
        open_labelled("cifar10", split="train")
    # A build takes the training pictures, too, with their split.
    shard = home / "snapshots" / "c0ffee" / "train" / "0.tar"
    save_all(tmp_path, "0.webp", "1.webp")
    large = [(tmp_path / f"{n}.webp").read_bytes() for n in range(2)]
    write_tar(shard, {"s0.webp": large[0], "s0.cls": b"0", "s1.webp": large[1], "s1.cls": b"1"})
    folder, built = build_once("cifar10", tmp_path / "made", uncaptioned=True)
    assert built is not None and built.pictures == {"train": 2}
    assert built.rejected == {"picture": {"too-small": 1}}  # that of the test, 4 x 4 pixels
    assert built.labels == {"airplane": 1, "automobile": 1} and folder.name.startswith("cifar10-")
    assert open_labelled("cifar10").split == "test"  # as before
