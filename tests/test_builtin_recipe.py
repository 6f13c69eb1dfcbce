"""How the built-in model is made: WordNet, names of what pictures show, the classifier as a teacher."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import metrics, run, weights

from clipkit.arrays import Float32
from clipkit.errors import InputError
from clipkit.training import TrainConfig, resume, train
from clipkit.training.data import CaptionedPictures
from clipkit.training.registry import METHODS
from clipkit.training.run_folder import RunFolder
from data_prep.builtin_model import class_targets, heads, strength, vocabulary
from data_prep.builtin_model.class_targets import class_loss
from data_prep.builtin_model.sources import Example
from data_prep.builtin_model.vocabulary import Class, Names
from data_prep.builtin_model.wordnet import WordNet

pytestmark = pytest.mark.end_to_end

# Animals, one of them with a name, and an idea, as wndb(5WN) has them: offset, file, kind of word, how
# many names (hexadecimal), names, how many pointers (decimal), pointers.
DATA_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE, by
00000001 05 n 01 animal 0 001 ~ 00000002 n 0000 | a living organism
00000002 05 n 02 dog 0 domestic_dog 0 001 @ 00000001 n 0000 | a member of the genus Canis
00000003 05 n 01 puppy 0 001 @ 00000002 n 0000 | a young dog
00000004 05 n 01 cat 0 002 @ 00000001 n 0000 #m 00000001 n 0000 | feline mammal
00000005 18 n 01 Rex 0 001 @i 00000002 n 0000 | a dog | of this name
00000006 09 n 01 idea 0 000 | the content of cognition
00000007 05 n 01 bird 0 001 @ 00000001 n 0000 | has feathers
"""
INDEX_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE, by
animal n 1 1 ~ 1 1 00000001
bird n 1 1 @ 1 0 00000007
cat n 1 2 @ #m 1 0 00000004
dog n 2 1 @ 2 1 00000002 00000006
domestic_dog n 1 1 @ 1 0 00000002
idea n 1 0 1 1 00000006
puppy n 1 1 @ 1 0 00000003
rex n 1 1 @i 1 0 00000005
"""
COUNTS = """\
dog%1:05:00:: 1 42
dog%1:18:00:: 2 2
dog%2:38:00:: 1 7
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    for name, text in {
        "data.noun": DATA_NOUN,
        "index.noun": INDEX_NOUN,
        "cntlist.rev": COUNTS,
    }.items():
        (tmp_path / name).write_text(text)
    return WordNet.read(tmp_path)


def test_wordnet_s_files_are_read(wordnet: WordNet) -> None:
    assert wordnet.synsets["00000002"].names == ("dog", "domestic dog")
    assert list(wordnet.kinds("00000003")) == ["00000002", "00000001"]
    assert list(wordnet.kinds("00000004")) == ["00000001"]  # what it is part of is no kind of it
    assert wordnet.synsets["00000005"].file == "named"
    assert wordnet.meanings["dog"] == ("00000002", "00000006")
    assert wordnet.counts == {"dog": 44}  # the noun, not the verb
    covered = wordnet.covered(["00000003", "00000004"])
    assert covered == {"00000002": [0], "00000001": [0, 1]}


def by_letter(texts: Sequence[str]) -> Float32:
    """Unit rows that are equal for texts of one initial and orthogonal for others."""
    return np.eye(26, dtype=np.float32)[[ord(text[0].lower()) - ord("a") for text in texts]]


def test_names_of_classes_kinds_and_nouns(wordnet: WordNet) -> None:
    """Classes: puppy, cat, bird. "animal" is all; "dog" has one class only, so it is no kind. Of the
    nouns "dog" is the puppy's kind, so it is the puppy; "domestic dog" is no common pair, Rex a name, an
    idea cannot be seen. Without the cat nothing of it is left, and "animal" is the other two."""
    names = {"00000003": ("puppy",), "00000004": ("cat", "Cat"), "00000007": ("bird",)}
    classes = [Class(named, offset, Path("photo.jpg")) for offset, named in names.items()]
    common = {"animal", "bird", "cat", "dog", "domestic", "puppy", "rex", "idea"}

    def firsts(names: Names) -> list[str]:
        return [texts[0] for texts in names.texts]

    rng = random.Random(0)
    own, kinds, nouns = vocabulary.make(classes, wordnet, common, by_letter, rng=rng)
    assert firsts(own) == ["puppy", "cat", "bird"] and own.classes.tolist() == np.eye(3).tolist()
    assert len(own.texts[0]) == 4 and all("puppy" in text for text in own.texts[0])
    assert len(own.texts[1]) == 8  # two names, each alone and in three prompts
    assert firsts(kinds) == ["animal"] and kinds.classes.tolist() == [[1, 1, 1]]
    shares = dict(zip(firsts(nouns), nouns.classes, strict=True))
    assert shares.keys() == {"animal", "bird", "cat", "dog", "puppy"}
    assert shares["animal"] == pytest.approx([1 / 3] * 3)
    assert shares["dog"] == pytest.approx([1, 0, 0], abs=1e-6) == shares["puppy"]

    own, kinds, nouns = vocabulary.make(classes, wordnet, common, by_letter, rng=rng, without=[1])
    assert firsts(own) == ["puppy", "bird"] and own.classes.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert kinds.classes.tolist() == [[1, 0, 1]]
    assert "cat" not in firsts(nouns) and not nouns.classes[:, 1].any()
    assert nouns.classes[0] == pytest.approx([1 / 2, 0, 1 / 2])  # animal


def test_a_word_far_from_all_classes_is_left_out(wordnet: WordNet) -> None:
    """Animals, and a dog that is nearer to nothing: with its kind's name unlike its own."""
    classes = [
        Class((name,), offset, Path("p.jpg"))
        for name, offset in (("cat", "00000004"), ("bird", "00000007"))
    ]
    common = {"animal", "bird", "cat", "dog", "puppy"}
    *_, nouns = vocabulary.make(classes, wordnet, common, by_letter, rng=random.Random(0))
    assert [texts[0] for texts in nouns.texts] == ["animal", "bird", "cat"]


def test_lists_of_names_are_stored(tmp_path: Path) -> None:
    texts = (("ca\u00f1on", 'a "gun"'), ("cat",))
    lists = [Names(texts, np.array([[1, 0.25], [0, 1]], np.float32), 0.5)]
    vocabulary.save(lists, tmp_path / "names.npz")
    (read,) = vocabulary.load(tmp_path / "names.npz")
    assert (read.texts, read.weight) == (texts, 0.5)
    assert read.classes.dtype == np.float32 and (read.classes == lists[0].classes).all()
    drawn, said = read.draw(random.Random(0), most=1)
    assert said[0] in texts[drawn[0]]
    assert read.draw(random.Random(0), most=9)[0] == [0, 1]


def test_the_class_loss_by_hand() -> None:
    """Two pictures, two names, at right angles but for the own pair: scores are 1 and 0. The first
    picture shows the first name only, the second both alike. The softmax of (1, 0) is p, q.

    By picture: -log p for the first, with weight 1 of 3; -(log p + log q) / 2 for the second, with 2 of
    3. By name: the first is in both pictures, -(log p + log q) / 2 with weight 2 of 3; the second in
    its own, -log p with 1 of 3. Powers leave 0 and 1 as they are."""
    rows = torch.eye(2)
    shown = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    log_p, log_q = math.log(1 / (1 + math.exp(-1))), math.log(1 / (1 + math.exp(1)))
    expected = -(log_p / 3 + (log_p + log_q) / 2 * 2 / 3)  # both ways
    loss = class_loss(rows, rows, torch.tensor(0.0), shown, torch.ones(2))
    assert float(loss) == pytest.approx(expected)


def test_the_class_loss_of_more_names_than_pictures() -> None:
    """The third name is the first's vector again, but shown by nobody. By picture: scores (1, 0, 1) and
    (0, 1, 0), the first and the second name right. By name: (1, 0), the own picture right."""
    names = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    shown = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    e = math.e
    by_picture = -(math.log(e / (2 * e + 1)) + math.log(e / (e + 2))) / 2
    loss = class_loss(torch.eye(2), names, torch.tensor(0.0), shown, torch.ones(3))
    assert float(loss) == pytest.approx((by_picture - math.log(e / (e + 1))) / 2)


def test_what_shows_often_is_not_what_an_unclear_picture_is_taken_for() -> None:
    """A picture at right angles to two names shows the second, which one picture of ten does: its share
    is a tenth before anything is learnt. By name: of one picture, nothing to tell apart. Fails without
    `often`: log 2 / 2."""
    picture, names = torch.eye(3)[2:], torch.eye(3)[:2]
    loss = class_loss(
        picture,
        names,
        torch.tensor(0.0),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([0.9, 0.1]),
    )
    assert float(loss) == pytest.approx(math.log(10) / 2)


def test_how_often_things_show() -> None:
    """Two pictures, two classes, three things: the first class, both, neither. Powers are 0.7."""
    seen = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    shares = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    things = Names((("cat",), ("animal",), ("house",)), shares, 1.0)
    (often,) = class_targets.how_often(seen, [things])
    assert often.tolist() == pytest.approx([(1 + 0.5**0.7) / 2, 1, 0], abs=1e-6)
    assert often[2] > 0  # its logarithm is finite
    (ones,) = class_targets.how_often(seen, [things], adjust=False)
    assert ones.tolist() == [1, 1, 1]


def test_a_name_that_no_picture_shows_and_a_picture_without_names_are_no_fault() -> None:
    """Fails without the bounds: 0 / 0."""
    images = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.manual_seed(0)), dim=1)
    images.requires_grad_()
    shown = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    loss = class_loss(images, torch.eye(4)[:2], torch.tensor(1.0), shown, torch.ones(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(images.grad).all()


# ---- the method


def write_teaching(folder: Path, data: Path) -> Path:
    """Four classes, each picture sure of one of them; three names of classes, one of a kind."""
    folder.mkdir()
    pictures = CaptionedPictures.read(data, "train")
    eye = np.eye(4, dtype=np.float32)
    seen = 0.97 * eye[np.arange(len(pictures)) % 4] + 0.01
    np.savez(folder / "classes.npz", image_ids=pictures.image_ids, probabilities=seen)
    lists = [
        Names((("red",), ("green", "a green one"), ("blue",)), eye[:3], 1.0),
        Names((("colour",),), eye[:2].sum(0, keepdims=True), 0.5),
    ]
    vocabulary.save(lists, folder / "names.npz")
    return folder


@pytest.fixture
def taught(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.setitem(METHODS, "class_targets", class_targets.ENTRY)
    folder = write_teaching(tmp_path / "teaching", Path(options["data"]))
    return options | {"method": "class_targets", "teaching": str(folder), "interpolate": False}


def test_the_towers_learn_what_the_classifier_sees(taught: dict[str, Any]) -> None:
    """Both losses fall; with weight 0 the weights are those of method pairs."""
    summary = run(taught, epochs=25, batch=14, learning_rate=1e-2, crop=1.0)
    lines = [line for line in metrics(summary.folder) if "loss" in line]
    first, last = lines[0], lines[-1]
    assert (
        last["class_loss"] < 0.9 * first["class_loss"] and last["pairs_loss"] < first["pairs_loss"]
    )
    assert first["loss"] == pytest.approx(first["pairs_loss"] + first["class_loss"], rel=1e-5)
    unweighted = run(taught, class_weight=0.0, name="unweighted")
    plain = {name: value for name, value in taught.items() if name not in ("method", "teaching")}
    pairs = run(plain, name="pairs")
    assert weights_differ_by(unweighted.checkpoint, pairs.checkpoint) < 1e-6


def test_without_adjustment_all_names_count_as_if_they_showed_alike(
    taught: dict[str, Any],
) -> None:
    """Each class shows in as many pictures, but two of four are of the one kind."""
    taught |= {"epochs": 1, "batch": 14}

    def first_loss(name: str, **changed: Any) -> float:
        (line,) = [x for x in metrics(run(taught, name=name, **changed).folder) if "loss" in x]
        return float(line["class_loss"])

    assert first_loss("plain", adjust=False) != pytest.approx(first_loss("adjusted"), rel=1e-4)


def weights_differ_by(one: Path | None, other: Path | None) -> float:
    assert one is not None and other is not None
    first, second = weights(one), weights(other)
    return max(float((first[n].float() - second[n].float()).abs().max()) for n in first)


def test_a_run_that_was_stopped_ends_with_the_same_weights(taught: dict[str, Any]) -> None:
    """Names are drawn from seed, epoch and batch alone: two of three each time."""
    whole = run(taught, names=2, name="whole")
    stop = threading.Event()
    config = TrainConfig.from_mapping({**taught, "names": 2, "name": "parts"})
    train(config, stop=stop, on_progress=lambda p: stop.set() if p.done == 1 else None)
    parts = resume(Path(taught["out"]) / "parts")
    assert weights_differ_by(whole.checkpoint, parts.checkpoint) == 0


def test_pictures_that_the_classifier_has_not_seen_are_not_taught(
    taught: dict[str, Any], tmp_path: Path
) -> None:
    """A picture without probabilities has no part in the class loss; if none has any, it fails."""
    file = tmp_path / "teaching" / "classes.npz"
    with np.load(file) as arrays:
        ids, seen = arrays["image_ids"], arrays["probabilities"]
    taught |= {"epochs": 1, "batch": 14}

    def first_class_loss(**changed: Any) -> float:
        (line,) = [x for x in metrics(run(taught, **changed).folder) if "loss" in x]
        return float(line["class_loss"])

    whole = first_class_loss(name="whole")
    np.savez(file, image_ids=ids[1:], probabilities=seen[1:])
    assert first_class_loss(name="fewer") != pytest.approx(whole, rel=1e-4)
    np.savez(file, image_ids=["other"], probabilities=seen[:1])
    with pytest.raises(
        InputError, match=r"has none of the 14 pictures of .*; run `recipe start` on"
    ):
        run(taught)
    file.unlink()
    with pytest.raises(
        InputError, match=r"teaching is .*, which has no classes.npz; run `recipe sta"
    ):
        run(taught, name="lacking")
    with pytest.raises(InputError, match="class_targets needs teaching"):
        run({name: value for name, value in taught.items() if name != "teaching"})


def test_some_pictures_are_seen_as_thumbnails() -> None:
    """A view gets the picture itself, or one of 28 to 64 pixels of the same shape; the picture stays."""
    sizes = []

    class Seen:
        def draw(self, image: Image.Image, _: np.random.Generator) -> tuple[torch.Tensor, Float32]:
            sizes.append(image.size)
            return torch.zeros(3, 2, 2, dtype=torch.uint8), np.empty(0, np.float32)

    picture = Image.new("RGB", (400, 200))
    augment = class_targets.Thumbnails(Seen(), share=0.5)
    for seed in range(200):
        augment.draw(picture, np.random.default_rng(seed))
    small = [size for size in sizes if size != (400, 200)]
    assert 70 < len(small) < 130 and picture.size == (400, 200)
    assert all(28 <= width <= 64 and abs(2 * height - width) <= 1 for width, height in small)


def one_of_two(rank: int, folder: str, options: dict[str, Any]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    METHODS["class_targets"] = class_targets.ENTRY
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run(options, name="two")
    dist.destroy_process_group()


@pytest.mark.slow  # three processes import the towers' libraries
def test_two_processes_equal_one(taught: dict[str, Any], tmp_path: Path) -> None:
    """With three names in a step, which two processes cannot share evenly."""
    taught |= {"names": 2, "epochs": 1, "chunk": 2}
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), taught), nprocs=2)
    run(taught, name="one")
    one, two = (RunFolder(tmp_path / "runs" / name).load() for name in ("one", "two"))
    assert one is not None and two is not None
    start = weights(Path(taught["start"]))
    for name, tensor in one["parameters"].items():
        moved = (tensor - start.get(name, 0)).abs().mean().clamp(min=1e-4)
        assert (two["parameters"][name] - tensor).abs().mean() <= 0.02 * moved, name


# ---- the heads


class TinyText(torch.nn.Module):
    """A text tower's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, 6)
        self.proj = torch.nn.Linear(6, 4)


def test_the_heads_are_trained_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven photos and seven drawings with features of 5 numbers, and a classifier of three classes."""
    monkeypatch.setattr(heads, "_STEPS", 60)
    torch.manual_seed(0)
    nouns = "dog cat car boat tree house cake".split()
    photos = [Example(Path(f"{n}.jpg"), (f"a {n} outside",)) for n in nouns]
    art = [Example(Path(f"{n}.png"), (f"old {n}",), (n,), art=True) for n in nouns]
    model = torch.nn.Module()
    model.visual, model.text = torch.nn.Module(), TinyText()
    model.visual.head = torch.nn.Linear(5, 4)
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def pool(texts: Sequence[str]) -> torch.Tensor:
        codes = [1 + sum(map(ord, text)) % 999 for text in texts]
        return model.text.embedding(torch.tensor(codes)).detach()

    features = torch.rand(14, 5)
    seen = torch.rand(7, 3).softmax(1)  # of the photos
    names = Names((("violin",), ("castle",), ("umbrella",)), np.eye(3, dtype=np.float32), 1.0)
    heads.train(model, photos + art, features, seen, [names], pool, random.Random(0))
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(losses) == 3 and losses[-1] < 0.98 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - {"text.embedding.weight"}


def test_vectors_keep_the_order_of_pictures_and_are_made_once(tmp_path: Path) -> None:
    """Seven pictures in batches of three, read by several threads, the first slowest."""

    class Grey:
        encoder_id, preferred_batch = "grey", 3

        def preprocess(self, picture: Image.Image) -> float:
            return float(np.asarray(picture).mean())

        def encode_images(self, levels: Sequence[float]) -> Float32:
            return np.array([[level, 1.0] for level in levels], np.float32)

    def picture(level: int) -> strength.Picture:
        def read() -> Image.Image:
            time.sleep(0.05 if level == 0 else 0)
            reads.append(level)
            return Image.new("L", (4, 4), level)

        return strength.Picture(str(level), "greys", frozenset(), read)

    reads: list[int] = []
    pictures = [picture(level) for level in range(0, 70, 10)]
    for _ in range(2):
        vectors = strength.encode(Grey(), pictures, tmp_path)  # type: ignore[arg-type]
        assert vectors.tolist() == [[level, 1.0] for level in range(0, 70, 10)]
    assert sorted(reads) == list(range(0, 70, 10))
