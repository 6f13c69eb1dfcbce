"""Batches: one caption of a picture, equal captions known, every epoch another order, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit import towers
from clipkit.errors import DatasetError
from clipkit.training import inputs as inputs_module
from clipkit.training.augment import CropAndFlip, random_view
from clipkit.training.data import CaptionedPictures, fitted_batch, replaced, together
from clipkit.training.inputs import Batch, PictureInputs, SpilledPictures
from clipkit.training.towers import TrainableTowers

Picture = Callable[..., Image.Image]


def write_split(
    folder: Path, captions: list[list[str]], picture: Picture, *, split: str = "train"
) -> Path:
    """A dataset folder whose picture i is noise of seed i, 40 x 32 pixels."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, texts in enumerate(captions):
        picture(40, 32, seed=i).save(folder / split / f"{i}.png")
        lines.append(
            json.dumps({"file_name": f"{i}.png", "image_id": f"{i:04}", "captions": texts})
        )
    (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


FIVE_EACH = [[f"picture {i} caption {c}" for c in range(5)] for i in range(10)]


@pytest.fixture
def ten(tmp_path: Path, noise_picture: Picture) -> CaptionedPictures:
    return CaptionedPictures.read(write_split(tmp_path, FIVE_EACH, noise_picture), "train")


def test_no_batch_holds_two_captions_of_a_picture(ten: CaptionedPictures) -> None:
    """Fails for the version that makes every caption a row: five captions of one picture would be
    negatives of it."""
    for epoch in range(4):
        plans = ten.plans(epoch=epoch, batch=3, seed=0)
        assert len(plans) == 3  # of ten pictures one is left over
        seen = np.concatenate([plan.pictures for plan in plans])
        assert len(set(seen)) == 9
        for plan in plans:
            for picture, text in zip(plan.pictures, plan.texts[0], strict=True):
                assert text in ten.owned[picture]


def test_every_epoch_has_its_own_order_and_captions(ten: CaptionedPictures) -> None:
    """Fails for a sampler that is seeded once: it repeats one order every epoch."""
    epochs = [ten.plans(epoch=e, batch=10, seed=0)[0] for e in range(5)]
    assert len({tuple(plan.pictures) for plan in epochs}) == 5
    for picture in range(10):  # five epochs use each of the five captions once
        used = [int(plan.texts[0, list(plan.pictures).index(picture)]) for plan in epochs]
        assert sorted(used) == sorted(ten.owned[picture])
    again = ten.plans(epoch=3, batch=10, seed=0)[0]
    assert (again.pictures == epochs[3].pictures).all() and (again.texts == epochs[3].texts).all()
    other = ten.plans(epoch=3, batch=10, seed=1)[0]
    assert (other.pictures != epochs[3].pictures).any()


def test_too_few_pictures_are_an_error(ten: CaptionedPictures) -> None:
    """Fails for a loader that drops the last partial batch in silence: no steps, and no error."""
    words = "10 training pictures, fewer than one batch of 11; use a batch of at most"
    with pytest.raises(DatasetError, match=words):
        ten.plans(epoch=0, batch=11, seed=0)


def test_equal_captions_are_known_whatever_their_spelling(
    tmp_path: Path, noise_picture: Picture
) -> None:
    """Picture 0 says "A dog." and "a cat"; 1 says "a  dog"; 2 something else. If the batch holds
    0's cat and 1's dog, then (picture 0, caption of 1) is true, and (picture 1, cat) is not."""
    folder = write_split(tmp_path, [["A dog.", "a cat"], ["a  dog"], ["a bird"]], noise_picture)
    data = CaptionedPictures.read(folder, "train")
    found = set()
    for epoch in range(2):
        plan = data.plans(epoch=epoch, batch=3, seed=0)[0]
        same = data.same(plan)
        assert same is not None
        place = {int(p): i for i, p in enumerate(plan.pictures)}
        said = data.texts[plan.texts[0, place[0]]]
        found.add(said)
        expected = torch.eye(3, dtype=torch.bool)
        expected[place[0], place[1]] = True
        if said == "A dog.":
            expected[place[1], place[0]] = True
        assert torch.equal(same.of_pictures(0, 3) | torch.eye(3, dtype=torch.bool), expected)
    assert found == {"A dog.", "a cat"}


@pytest.mark.parametrize("captions", [3, 40], ids=["classes", "few in common"])
def test_pairs_that_belong_together_take_memory_by_the_batch(captions: int) -> None:
    """400 pictures of up to three of `captions` captions: the groups mark the pairs that a loop finds.
    Fails for the version that makes a matrix of 400 * 400 marks."""
    rng = np.random.default_rng(captions)
    owned = tuple(rng.permutation(captions)[: rng.integers(1, 4)] for _ in range(400))
    names = tuple(map(str, range(400)))
    data = CaptionedPictures(
        Path(), names, names, names[:captions], owned, np.arange(captions) // 2, 0
    )
    (plan,) = data.plans(epoch=0, batch=400, seed=0)
    same = data.same(plan)
    assert same is not None
    assert sum(part.numel() for part in (same.captions, same.pictures, same.groups)) <= 7 * 400
    marks = same.of_pictures(0, 400)
    meant = data.meanings[plan.texts[0]]
    for i, picture in enumerate(plan.pictures):
        expected = np.isin(meant, data.meanings[owned[picture]])
        marks[i, i] = expected[i] = True
        assert marks[i].tolist() == expected.tolist()


def test_no_equal_captions_need_no_matrix(ten: CaptionedPictures) -> None:
    assert ten.same(ten.plans(epoch=0, batch=5, seed=0)[0]) is None


def test_files_of_equal_content_are_one_picture(tmp_path: Path, noise_picture: Picture) -> None:
    folder = write_split(tmp_path, [["one"], ["two"], [], ["one"]], noise_picture)
    path = folder / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace('"0001"', '"0000"'))
    data = CaptionedPictures.read(folder, "train")
    assert data.image_ids == ("0000", "0003") and data.paths == ("train/0.png", "train/3.png")
    assert [[data.texts[n] for n in numbers] for numbers in data.owned] == [["one", "two"], ["one"]]
    assert data.left_out == 1
    assert data.owner.tolist() == [0, 0, 1] and data.captions.tolist() == [0, 1, 0]


def test_a_part_is_the_same_part_each_time(ten: CaptionedPictures) -> None:
    part = CaptionedPictures.read(ten.folder, "train", most=4)
    assert part.image_ids == ("0000", "0001", "0002", "0003")
    assert part.fingerprint() != ten.fingerprint()
    again = CaptionedPictures.read(ten.folder, "train")
    assert again.fingerprint() == ten.fingerprint()


def test_missing_pictures_and_captions_are_said(tmp_path: Path, noise_picture: Picture) -> None:
    folder = write_split(tmp_path, [["one"], ["two"]], noise_picture)
    (folder / "train" / "1.png").unlink()
    with pytest.raises(DatasetError, match=r"1\.png is missing, but train/metadata\.jsonl names"):
        CaptionedPictures.read(folder, "train")
    write_split(folder, [[], []], noise_picture, split="validation")
    with pytest.raises(DatasetError, match="no picture with a caption in split 'validation'"):
        CaptionedPictures.read(folder, "validation")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"file_name": ', "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        (
            '{"file_name": "1.png", "image_id": 5, "captions": ["a"]}',
            "line 2: the row has no image_id",
        ),
        ('{"file_name": "1.png", "captions": ["a"]}', "line 2: the row has no image_id"),
        ('{"file_name": "../x", "image_id": "1"}', r"file_name '../x' must stay below the folder"),
        ('{"file_name": "/etc/x", "image_id": "1"}', "file_name '/etc/x' must stay below the fol"),
        ('{"image_id": "1", "captions": ["a"]}', "line 2: no picture is named, but None"),
        ('{"file_name": "1.png", "image_id": "1", "captions": [3]}', "line 2: captions must be a"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, noise_picture: Picture, line: str, sentence: str
) -> None:
    folder = write_split(tmp_path, [["one"]], noise_picture)
    with (folder / "train" / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DatasetError, match=sentence):
        CaptionedPictures.read(folder, "train")


def test_what_is_no_dataset_and_a_split_that_is_missing(
    tmp_path: Path, noise_picture: Picture
) -> None:
    with pytest.raises(DatasetError, match="none of train/, validation/, test/ holds a metadata"):
        CaptionedPictures.read(tmp_path, "train")
    write_split(tmp_path, [["one"]], noise_picture)
    with pytest.raises(DatasetError, match="has no split 'validation'; it has train"):
        CaptionedPictures.read(tmp_path, "validation")
    write_split(tmp_path / "b", [["one"]], noise_picture, split="test")
    with pytest.raises(DatasetError, match=r"no split 'train'; it has test; .*--split train"):
        CaptionedPictures.read(tmp_path / "b", "train")


def test_hard_negatives_share_a_batch(ten: CaptionedPictures) -> None:
    """Pictures 0-4 and 5-9 are look-alikes: batches of five hold one kind where both are whole."""
    alike = np.array([[j for j in range(i // 5 * 5, i // 5 * 5 + 5) if j != i] for i in range(10)])
    for epoch in range(3):
        order = together(ten.order(epoch, 0), alike)
        plans = ten.plans(epoch=epoch, batch=5, seed=0, order=order)
        assert {len({int(p) // 5 for p in plan.pictures}) for plan in plans} == {1}
        assert len({int(p) for plan in plans for p in plan.pictures}) == 10
    nobody = np.full((10, 2), -1)
    assert sorted(together(ten.order(0, 0), nobody)) == list(range(10))


def test_two_captions_of_a_picture_are_different_ones(ten: CaptionedPictures) -> None:
    """Two of five a time: five epochs use each caption twice. Without captions there are no texts."""
    epochs = [ten.plans(epoch=e, batch=10, seed=0, texts=2)[0] for e in range(5)]
    for picture in range(10):
        used = [plan.texts[:, list(plan.pictures).index(picture)] for plan in epochs]
        assert all(first != second for first, second in used)
        assert sorted(np.concatenate(used)) == sorted([*ten.owned[picture]] * 2)
    assert ten.plans(epoch=0, batch=10, seed=0, texts=0)[0].texts.shape == (0, 10)


def test_unreadable_pictures_give_way_to_others(ten: CaptionedPictures) -> None:
    """Two batches of four leave two of ten out: these come first, then pictures of the other batch."""
    plans = ten.plans(epoch=0, batch=4, seed=0)
    planned = np.concatenate([plan.pictures for plan in plans])
    bad = {int(p) for p in (*plans[0].pictures[:3], plans[1].pictures[0])}
    done = replaced(plans, bad, ten)
    for plan, before in zip(done, plans, strict=True):
        assert not bad & set(plan.pictures.tolist()) and len(set(plan.pictures.tolist())) == 4
        kept = ~np.isin(before.pictures, list(bad))
        assert (plan.pictures[kept] == before.pictures[kept]).all()
        assert all(t in ten.owned[p] for p, t in zip(plan.pictures, plan.texts[0], strict=True))
    left_out = set(range(10)) - set(planned.tolist())
    assert left_out <= set(np.concatenate([plan.pictures for plan in done]).tolist())
    assert all(a is b for a, b in zip(replaced(plans, left_out, ten), plans, strict=True))
    with pytest.raises(
        DatasetError, match="too few readable training pictures for a batch of 4: 7"
    ):
        replaced(plans, range(7), ten)


def test_an_unreadable_picture_gives_way_to_one_of_its_label(ten: CaptionedPictures) -> None:
    labelled = replace(ten, labels=np.arange(10) % 5, classes=tuple("abcde"))
    plans = labelled.plans(epoch=0, batch=5, seed=0)
    bad = int(plans[0].pictures[2])
    other = replaced(plans, {bad}, labelled)[0].pictures[2]
    partner = (bad + 5) % 10
    assert other == partner or partner in plans[0].pictures


@given(st.integers(1, 10**6), st.integers(2, 4096))
def test_a_fitted_batch_is_a_power_of_two_with_four_to_an_epoch(pictures: int, most: int) -> None:
    batch = fitted_batch(pictures, most=most)
    assert 2 <= batch <= max(most, 2)
    assert batch in (2, most) or batch.bit_count() == 1
    assert pictures < 8 or pictures // batch >= 4


def test_a_stream_taken_up_again_gives_the_same_pixels(
    ten: CaptionedPictures, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Views depend on seed, epoch and picture: not on threads, and not on where the run began."""
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu", precision="float32")
    model = TrainableTowers(encoder, loss="infonce")

    def stream(start: int, workers: int, epoch: int = 2) -> list[torch.Tensor]:
        made = PictureInputs(ten, model, augment=CropAndFlip(encoder, 0.5), seed=4, workers=workers)
        batches = made.stream(ten.plans(epoch=epoch, batch=3, seed=4)[start:])
        return [batch.pictures[0] for batch in batches]

    whole, rest, other = stream(0, 3), stream(1, 1), stream(0, 2, epoch=3)
    assert whole[0].shape == (3, 3, 32, 32) and whole[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(torch.cat(whole).sort(0).values, torch.cat(other).sort(0).values)


def test_a_batch_beyond_memory_lies_in_a_file_and_is_the_same(
    ten: CaptionedPictures, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TrainableTowers(towers.load(str(tiny_checkpoint()), device="cpu"), loss="infonce")
    plans = ten.plans(epoch=0, batch=5, seed=0)

    def batches() -> list[Batch]:
        return list(
            PictureInputs(ten, model, augment=CropAndFlip(model.encoder, 0.5), seed=4).stream(plans)
        )

    whole = batches()
    monkeypatch.setattr(inputs_module, "_IN_MEMORY", 1)
    spilled = batches()
    rows = torch.tensor([4, 0, 2])
    for a, b in zip(whole, spilled, strict=True):
        assert isinstance(b.pictures[0], SpilledPictures) and len(b.pictures[0]) == 5
        assert torch.equal(a.pictures[0][rows], b.pictures[0][rows])


@pytest.mark.parametrize(
    ("small", "most", "expected"),
    [(96, 2**28, 10), (96, 3 * (4 * 40 * 32 + 1024), 3 + 7 * 6), (39, 2**28, 60), (96, 0, 60)],
    ids=["all kept", "some kept", "too large", "no room"],
)
def test_small_pictures_are_decoded_once(
    ten: CaptionedPictures,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    small: int,
    most: int,
    expected: int,
) -> None:
    """Ten pictures of 40 x 32, two views of each, three epochs: ten files are read in place of sixty,
    unless they are too large or there is no room. The views are the same."""
    model = TrainableTowers(towers.load(str(tiny_checkpoint()), device="cpu"), loss="infonce")
    reads: list[int] = []

    class Counted(PictureInputs):
        def read(self, picture: int) -> bytes:
            reads.append(picture)
            return super().read(picture)

    def views() -> torch.Tensor:
        augment = CropAndFlip(model.encoder, 0.5)
        inputs = Counted(ten, model, augment=augment, views=2, workers=1)
        inputs._decoded_before = inputs_module._Decoded(most)
        plans = [plan for epoch in range(3) for plan in ten.plans(epoch=epoch, batch=5, seed=0)]
        return torch.cat([view for batch in inputs.stream(plans) for view in batch.pictures])

    monkeypatch.setattr(inputs_module, "_SMALL", small)
    got, count = views(), len(reads)
    assert count == expected
    monkeypatch.setattr(inputs_module, "_SMALL", 0)
    assert torch.equal(got, views())


def test_a_split_without_some_pictures_decodes_its_own(
    ten: CaptionedPictures, tiny_checkpoint: Callable[..., Path]
) -> None:
    """What is kept goes by the picture, not by its number, which changes."""
    encoder = towers.load(str(tiny_checkpoint()), device="cpu")
    inputs = PictureInputs(ten, TrainableTowers(encoder, loss="infonce"))
    whole = torch.cat(list(inputs.pictures()))
    rest = torch.cat(list(inputs.without({0, 4}).pictures()))
    assert torch.equal(rest, whole[[1, 2, 3, 5, 6, 7, 8, 9]])


def test_what_is_served_is_what_the_encoder_makes_of_it(
    ten: CaptionedPictures, tiny_checkpoint: Callable[..., Path]
) -> None:
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu", precision="float32")
    inputs = PictureInputs(ten, TrainableTowers(encoder, loss="infonce"))
    pixels = torch.cat(list(inputs.pictures()))
    for row, path in zip(pixels, ten.paths, strict=True):
        assert torch.equal(row, encoder.preprocess(Image.open(ten.folder / path)))
    tokens = torch.cat(list(inputs.captions()))
    assert tokens.shape == (50, 77)
    batch = next(inputs.stream(ten.plans(epoch=0, batch=10, seed=0)))
    for row, picture in zip(batch.pictures[0], batch.plan.pictures, strict=True):
        assert torch.equal(row, pixels[picture])  # no crops, no flips: the picture as served


def test_a_broken_picture_is_named(
    ten: CaptionedPictures, tiny_checkpoint: Callable[..., Path]
) -> None:
    (ten.folder / "train" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu", precision="float32")
    inputs = PictureInputs(ten, TrainableTowers(encoder, loss="infonce"))
    with pytest.raises(DatasetError, match=r"train/7\.png: .*; restore them"):
        list(inputs.pictures())


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_picture_gives_a_view_of_the_target_size(
    shape: tuple[int, int], size: tuple[int, int], keep: float, squash: bool, seed: int
) -> None:
    view = random_view(
        Image.new("RGB", shape, (10, 200, 30)),
        size,
        np.random.default_rng(seed),
        keep=keep,
        squash=squash,
    )
    assert view.shape == (3, *size) and view.dtype == torch.uint8
    assert (view.float() - torch.tensor([10, 200, 30.0]).view(3, 1, 1)).abs().max() <= 1


def test_processes_of_one_machine_share_its_cores(
    ten: CaptionedPictures,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails for a version in which each process starts a decoder for every core of the machine."""
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu", precision="float32")
    trainable = TrainableTowers(encoder, loss="infonce")
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    assert PictureInputs(ten, trainable).workers == 1  # of 32 pixels, see `inputs`
    monkeypatch.setattr(inputs_module, "_VALUES_PER_THREAD", 64)
    assert PictureInputs(ten, trainable).workers == 32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert PictureInputs(ten, trainable).workers == 4
    assert PictureInputs(ten, trainable, workers=5).workers == 5
