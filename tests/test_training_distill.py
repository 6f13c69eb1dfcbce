"""Distillation: the terms by hand, teachers' vectors that are computed once, and whole runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from test_training_choices import Fixed, captioned
from test_training_data import write_split
from test_training_resume import final_state, train_with_a_kill
from training_runs import metrics, run, weights

from clipkit import towers
from clipkit.errors import DatasetError, InputError, ModelError
from clipkit.training import Progress, TrainConfig, resume, train
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.inputs import Batch
from clipkit.training.methods.distill import Distill
from clipkit.training.methods.method import Setup
from clipkit.training.run_folder import RunFolder
from clipkit.training.teachers import ModelTeacher, VectorFile, side_by_side, unit_vectors
from clipkit.training.validation import of_teacher

Checkpoint = Callable[..., Path]

ROOT5 = math.sqrt(5)


def write_vectors(path: Path, rows: Sequence[Sequence[float]], ids: Sequence[str] = ()) -> str:
    """A file of float32 vectors, of the pictures "0000", "0001", ..."""
    names = np.array(ids or [f"{i:04}" for i in range(len(rows))])
    np.savez(path, image_ids=names, vectors=np.array(rows, np.float32))
    return str(path)


# ---- the loss


class Rows:
    """Inputs that are the student's vectors already."""

    def __init__(self, data: CaptionedPictures, students: torch.Tensor) -> None:
        self.data, self._students = data, students

    def stream(self, plans: Sequence[Plan]) -> Iterator[Batch]:
        for plan in plans:
            yield Batch(plan, self.data, (self._students[torch.from_numpy(plan.pictures)],), [], [])


def distilled(students: torch.Tensor, teacher: str, **options: Any) -> Distill:
    """The method on pictures without captions, ready for its first step."""
    data = captioned([[] for _ in students])
    settings = {"data": "nowhere", "method": "distill", "teacher": teacher, **options}
    config = TrainConfig.from_mapping(settings)
    fake = SimpleNamespace(
        encoder=SimpleNamespace(dim=students.shape[1]),
        device=torch.device("cpu"),
        logit_scale=torch.nn.Parameter(torch.zeros(())),
        images=lambda rows: rows,
        mode=lambda _: None,
    )
    setup = Setup(config, None, config.method_options(), {}, fake, data, len(students), 1)  # type: ignore[arg-type]
    method = Distill(setup)
    method.prepare(Rows(data, students), lambda *_: None, threading.Event())  # type: ignore[arg-type]
    return method


def loss_of_all(method: Distill, students: torch.Tensor) -> torch.Tensor:
    plan = Plan(0, 0, np.arange(len(students)), np.empty((0, len(students)), np.int64))
    return method.loss([students], Batch(plan, method.setup.data, (students,), [], []))


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """Students E1 and E2. The teacher's unit rows (1, 0) and (0.6, 0.8) have the mean (0.8, 0.4).
    Without it they are (1, -2) / root 5 and the opposite. By a map that changes nothing the cosines
    are 1 / root 5 and -1 / root 5 for the first student, -2 / root 5 and 2 / root 5 for the second.
    One distance divided by its mean is 1, on both sides."""
    students = torch.eye(2)
    teacher = write_vectors(tmp_path / "teacher.npz", [[3, 0], [0.6, 0.8]])
    weights = {"cosine": 0.5, "relational": 3.0, "contrastive": 2.0, "teacher_temperature": 0.5}
    method = distilled(students, teacher, **weights)
    with torch.no_grad():
        method.shared["teacher_map.weight"].copy_(torch.eye(2))
        method.shared["teacher_map.bias"].zero_()
    value = loss_of_all(method, students)
    cosine = 2 - 3 / ROOT5
    contrast = (math.log1p(math.exp(-4 / ROOT5)) + math.log1p(math.exp(-8 / ROOT5))) / 2
    expected = {"cosine_loss": cosine, "relational_loss": 0.0, "contrastive_loss": contrast}
    assert method.metrics() == pytest.approx(expected, abs=2e-3)  # half precision
    assert value.item() == pytest.approx(0.5 * cosine + 2 * contrast, abs=2e-3)
    method = distilled(students, teacher, contrastive=0.0, cosine=0.0)
    assert loss_of_all(method, students).item() == 0 and list(method.metrics()) == [
        "relational_loss"
    ]


def test_the_relational_term_is_of_the_students_own_distances(tmp_path: Path) -> None:
    """Students at 0, 90 and 180 degrees: distances root 2, 2, root 2. The teacher's three rows have one
    distance from each other: relative 1, 1, 1. Fails for distances behind the map."""
    students = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    teacher = write_vectors(tmp_path / "teacher.npz", np.eye(3).tolist())
    method = distilled(students, teacher, cosine=0.0, contrastive=0.0)
    mean = (2 + 2 * math.sqrt(2)) / 3
    differences = [math.sqrt(2) / mean - 1, 2 / mean - 1, math.sqrt(2) / mean - 1]
    expected = np.mean([d * d / 2 for d in differences])
    assert loss_of_all(method, students).item() == pytest.approx(expected, abs=1e-3)


def test_the_map_begins_where_it_fits_best(tmp_path: Path) -> None:
    """The teacher sees what the student sees, turned into seven dimensions. Fails for a random map."""
    rng = np.random.default_rng(0)
    students = F.normalize(torch.from_numpy(rng.normal(size=(200, 4))).float(), dim=1)
    turned = students.double().numpy() @ rng.normal(size=(4, 7)) + 5.0
    method = distilled(students, write_vectors(tmp_path / "teacher.npz", turned.tolist()))
    assert sorted(method.shared) == ["teacher_map.bias", "teacher_map.weight"]
    value = loss_of_all(method, students)
    assert method.metrics()["cosine_loss"] < 0.06  # a cosine of 0.97
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.shared.values())


def test_agreement_is_recall_of_the_teachers_vectors() -> None:
    """The student's map turns its vectors by one place; the teacher's are turned too, but for the first
    two of twelve, which are each other's. The cosine of those is 0, of the other ten 1."""
    rows = torch.eye(12)
    fixed = Fixed(captioned([[]] * 12), rows, rows)
    fixed.device = torch.device("cpu")  # type: ignore[attr-defined]
    teachers = rows.roll(1, 1)
    teachers[[0, 1]] = teachers[[1, 0]]
    scores = of_teacher(fixed, fixed, teachers.half(), lambda x: x.roll(1, 1))  # type: ignore[arg-type]
    assert scores.metrics["student_to_teacher/R@1"] == pytest.approx(10 / 12)
    assert scores.space["positive_cosine"] == pytest.approx(10 / 12)


def test_several_teachers_count_alike() -> None:
    """(3, 4) and (0, 0.1): unit rows (0.6, 0.8) and (0, 1), together divided by the root of 2."""
    joined = side_by_side([torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.1]])])
    expected = [value / math.sqrt(2) for value in (0.6, 0.8, 0.0, 1.0)]
    assert joined.dtype == torch.float16 and joined[0].tolist() == pytest.approx(expected, abs=1e-3)


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "method distill needs a teacher; name a model, or a file"),
        ({"teacher": " , "}, "method distill needs a teacher"),
        ({"teacher": "x", "cosine": 0, "relational": 0, "contrastive": 0}, "nothing is learnt"),
        ({"teacher": "x", "recipe": "lit"}, "recipe lit cannot learn by method distill"),
        ({"teacher": "x", "space": "mine"}, "space is 'mine'"),
        ({"teacher": "x", "cosine": -1}, "cosine is -1"),
        ({"teacher": "x", "hard_negatives": 1}, "method distill has no such option"),
        (
            {"method": "pairs", "teacher": "x"},
            "method pairs has no such option; leave it out or use",
        ),
    ],
)
def test_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig.from_mapping({"data": "d", "method": "distill", **options})


def test_captions_are_needed_where_they_are_used(tmp_path: Path) -> None:
    def needs(**options: Any) -> frozenset[str]:
        settings = {"data": "d", "method": "distill", "teacher": "x", **options}
        return TrainConfig.from_mapping(settings).needs()

    assert needs() == frozenset() and needs(pairs=0.5) == {"captions"}
    assert TrainConfig.from_mapping({"data": "d"}).needs() == {"captions"}
    teacher = write_vectors(tmp_path / "teacher.npz", [[1, 0], [0, 1]])
    for unused in ({"label_smoothing": 0.1}, {"loss": "siglip"}):
        with pytest.raises(InputError, match=f"{next(iter(unused))} is set, but pairs is 0"):
            distilled(torch.eye(2), teacher, **unused)


# ---- teachers


def test_pictures_without_a_vector_are_named(tmp_path: Path) -> None:
    data = captioned([[]] * 12)
    rows = np.eye(12)[:2]
    file = VectorFile(Path(write_vectors(tmp_path / "few.npz", rows.tolist(), ["0003", "0001"])))
    words = (
        r"few\.npz has no vectors of 10 of 12 pictures: train/0\.png; train/2.*; and 2 more; add"
    )
    with pytest.raises(DatasetError, match=words):
        unit_vectors(file, data, lambda _: None)
    two = captioned([[]] * 2)
    rows[1] = np.nan
    file = VectorFile(Path(write_vectors(tmp_path / "nan.npz", rows.tolist())))
    with pytest.raises(
        DatasetError, match=r"nan\.npz has vectors that are zero or not .* 1 of 2 .*: train/1"
    ):
        unit_vectors(file, two, lambda _: None)


def test_vectors_are_found_by_image_id_in_any_order(tmp_path: Path) -> None:
    ids = ["0002", "of no picture", "0000", "0001"]
    rows = [[0.0, 0, 5], [1, 1, 1], [2, 0, 0], [0, 3, 0]]
    file = VectorFile(Path(write_vectors(tmp_path / "all.npz", rows, ids)))
    assert torch.equal(unit_vectors(file, captioned([[]] * 3), lambda _: None), torch.eye(3))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"vectors": np.eye(2)}, "is no file of vectors"),
        ({"image_ids": np.array([1, 2]), "vectors": np.eye(2)}, "they must be texts"),
        ({"image_ids": np.array(["a"]), "vectors": np.eye(2)}, "there must be as many of both"),
        ({"image_ids": np.array(["a", None]), "vectors": np.eye(2)}, "is no file of vectors"),
    ],
)
def test_what_is_no_file_of_vectors_is_refused(
    tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "teacher.npz", **arrays)
    with pytest.raises(InputError, match=words):
        VectorFile(tmp_path / "teacher.npz")
    (tmp_path / "teacher.npz").write_bytes(b"text")
    with pytest.raises(InputError, match="is no file of vectors"):
        VectorFile(tmp_path / "teacher.npz")
    with pytest.raises(InputError, match=r"cannot read .*nothing\.npz: No such file"):
        VectorFile(tmp_path / "nothing.npz")


class CountingEncoder:
    """A large model that is slow: a picture's vector is its mean colour."""

    spec, space_id, precision = "slow/model", "5105", "float32"
    dim, preferred_side, preferred_batch = 3, 8, 2

    def __init__(self) -> None:
        self.encoded, self.loaded = 0, 0

    def towers(self) -> CountingEncoder:
        self.loaded += 1
        return self

    def preprocess(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image, np.float32)).mean((0, 1))

    def encode_images(self, images: Sequence[torch.Tensor]) -> np.ndarray:
        self.encoded += len(images)
        return F.normalize(torch.stack(list(images)), dim=1).numpy()


def test_a_teachers_vectors_are_computed_once(
    tmp_path: Path, noise_picture: Callable[..., Any]
) -> None:
    """What was computed before a stop is not computed again; the second time nothing is, and the model
    is not loaded. Other pictures have another fingerprint."""
    folder = write_split(tmp_path / "d", [[] for _ in range(7)], noise_picture)
    data = CaptionedPictures.read(folder, "train", needs=())
    slow = CountingEncoder()
    teacher = ModelTeacher(slow, store=tmp_path / "v.sqlite", workers=1)  # type: ignore[arg-type]

    class Stopped(Exception): ...

    def stop(done: int) -> None:
        if done >= 4:
            raise Stopped

    with pytest.raises(Stopped):
        unit_vectors(teacher, data, stop)
    assert slow.encoded == 4
    done: list[int] = []
    first = unit_vectors(teacher, data, done.append)
    assert slow.encoded == 7 and done == [6, 7]
    loaded = slow.loaded
    assert torch.equal(unit_vectors(teacher, data, done.append), first)
    assert slow.encoded == 7 and slow.loaded == loaded
    fewer = CaptionedPictures.read(folder, "train", needs=(), most=3)
    unit_vectors(teacher, fewer, done.append)
    assert slow.encoded == 10
    (folder / "train" / "3.png").write_bytes(b"broken")
    rows = unit_vectors(ModelTeacher(slow, store=None), data, done.append)  # type: ignore[arg-type]
    assert not rows[3].any() and torch.equal(rows[4:], first[4:])  # it is left out of the run


# ---- two models made one


@pytest.mark.parametrize(
    ("image", "text"),
    [("timm-hf", "vit"), ("vit", "timm-hf"), ("resnet", "vit-quickgelu"), ("vit", "siglip")],
)
def test_two_models_are_combined(
    tmp_path: Path, tiny_checkpoint: Checkpoint, image: str, text: str
) -> None:
    """Texts are encoded as before; pictures pass the same tower as before up to the projection."""
    folder = tmp_path / "new" / "both"
    sources = [str(tiny_checkpoint(kind, seed=i)) for i, kind in enumerate((image, text))]
    towers.combine(*sources, folder)
    pictures, texts, both = (
        towers.load(spec, device="cpu", precision="float32") for spec in (*sources, str(folder))
    )
    captions = ["a red car", "the green guitar tree"]
    np.testing.assert_allclose(both.encode_texts(captions), texts.encode_texts(captions), atol=1e-6)
    assert both.dim == texts.dim and both.logit_scale == texts.logit_scale
    assert both.config.image_size == pictures.config.image_size
    assert (both.config.mean, both.config.resize_mode) == (
        pictures.config.mean,
        pictures.config.resize_mode,
    )
    old, new = (
        {name: t for name, t in weights(place).items() if name.startswith("visual.")}
        for place in (Path(sources[0]), folder)
    )
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert old.keys() == new.keys() and len(changed) < 4
    assert bool(changed) == (pictures.dim != texts.dim)
    assert all("proj" in name or "head" in name or "attnpool" in name for name in changed), changed
    with pytest.raises(InputError, match="both exists; give the combined model another folder"):
        towers.combine(*sources, folder)


def test_towers_of_two_activations_are_not_combined(
    tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    sources = [str(tiny_checkpoint(kind)) for kind in ("vit", "vit-quickgelu")]
    with pytest.raises(ModelError, match=r"computes with gelu and .* with quick_gelu"):
        towers.combine(*sources, tmp_path / "both")


# ---- whole runs


@pytest.fixture
def uncaptioned(tmp_path: Path, noise_picture: Callable[..., Any]) -> Path:
    """24 training and 12 validation pictures without captions."""
    for split, count in (("train", 24), ("validation", 12)):
        write_split(tmp_path / "plain", [[]] * count, noise_picture, split=split)
    return tmp_path / "plain"


@pytest.fixture
def taught(options: dict[str, Any], tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a short run of method distill, from captioned pictures."""
    teacher = tiny_checkpoint("timm-hf", seed=3)  # 160 pixels and 24 numbers, for a ViT of 32
    return {**options, "method": "distill", "teacher": str(teacher)}


@pytest.mark.end_to_end
def test_a_small_student_learns_what_a_larger_teacher_sees(
    taught: dict[str, Any], uncaptioned: Path
) -> None:
    """Without any caption: the loss falls, and the student's vectors find the teacher's on pictures that
    it has not seen."""
    sizes = {"epochs": 40, "batch": 12, "chunk": 12, "learning_rate": 3e-3, "interpolate": False}
    summary = run(taught, data=uncaptioned, drift=0, crop=1.0, flip=False, eval_every=20, **sizes)
    lines = metrics(summary.folder)
    terms = [line for line in lines if "loss" in line]
    assert set(terms[0]) >= {"cosine_loss", "relational_loss", "contrastive_loss"}
    assert terms[-1]["loss"] < 0.6 * terms[0]["loss"]
    scores = [line for line in lines if "positive_cosine" in line]
    assert "student_to_teacher/R@1" in scores[0] and summary.after is not None
    assert 1 - scores[-1]["positive_cosine"] < 0.5 * (1 - scores[0]["positive_cosine"])
    exported, start = weights(summary.checkpoint), weights(Path(str(taught["start"])))
    assert exported.keys() == start.keys()  # the map is not part of it
    changed = {name for name in start if not torch.equal(start[name], exported[name])}
    assert changed and all(name.startswith("visual.") for name in changed)


@pytest.mark.end_to_end
def test_captions_keep_the_texts_in_tune(taught: dict[str, Any]) -> None:
    """With the captions' loss both towers and the temperature are trained; validation is by captions."""
    summary = run(taught, pairs=0.5, interpolate=False, recipe="heads", epochs=6)
    assert summary.before is not None and "text_to_image/R@1" in summary.before
    line = next(line for line in metrics(summary.folder) if "loss" in line)
    names = ("cosine", "relational", "contrastive")
    expected = sum(line[f"{name}_loss"] for name in names) + 0.5 * line["pairs_loss"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    saved = RunFolder(summary.folder).load()
    assert saved is not None
    names = saved["parameters"]
    assert {"logit_scale", "teacher_map.weight", "visual.proj"} <= set(names)
    assert any(name.startswith("text.proj") for name in names)


@pytest.mark.end_to_end
def test_a_student_moves_into_its_teachers_space(
    taught: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The exported checkpoint is the student's picture side and the teacher's text side, untouched. A
    start with other texts, several teachers, or a file cannot lead there."""
    teacher = str(tiny_checkpoint("siglip", seed=3))
    towers.combine(str(taught["start"]), teacher, tmp_path / "both")
    into = {**taught, "teacher": teacher, "space": "teacher", "start": str(tmp_path / "both")}
    summary = run(into, pairs=1.0, keep="last")
    assert summary.drift == 0 and summary.checkpoint is not None
    result, theirs = (
        towers.load(spec, device="cpu", precision="float32")
        for spec in (str(summary.checkpoint), teacher)
    )
    captions = ["a red car", "the guitar"]
    assert np.array_equal(result.encode_texts(captions), theirs.encode_texts(captions))
    assert summary.encoder_id != summary.parent_id
    words = r"the text tower of .* is not that of .*clipkit\.towers\.combine\("
    with pytest.raises(InputError, match=words):
        run(into, start=taught["start"], name="other")
    with pytest.raises(InputError, match="name one model, whose text tower"):
        run(into, teacher=f"{teacher},{teacher}", name="several")


@pytest.mark.end_to_end
@pytest.mark.parametrize("recipe", ["full", "heads"])
def test_a_killed_run_ends_as_if_it_had_not_been(
    taught: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    taught |= {"checkpoint_every": 1, "pairs": 0.5, "recipe": recipe, "ema": 0.9}
    whole = run(taught)
    expected = final_state(whole.folder)
    config = TrainConfig.from_mapping({**taught, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", 4)
    got = final_state(again.folder)
    assert got.keys() == expected.keys() and any("teacher_map" in path for path in got)
    for path, value in expected.items():
        same = torch.equal(got[path], value) if torch.is_tensor(value) else got[path] == value
        assert same, path
    assert again.encoder_id == whole.encoder_id


@pytest.mark.end_to_end
def test_a_run_does_not_go_on_with_another_teacher(
    taught: dict[str, Any],
    noise_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = CaptionedPictures.read(noise_dataset, "train")
    rows = np.random.default_rng(0).normal(size=(len(data), 5)).tolist()
    write_vectors(tmp_path / "teacher.npz", rows, data.image_ids)
    stop = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == 2:
            stop.set()

    monkeypatch.chdir(tmp_path)
    taught["teacher"] = "teacher.npz"  # found again from another working folder
    stopped = train(TrainConfig.from_mapping(taught), on_progress=ask, stop=stop)
    monkeypatch.chdir("/")
    assert resume(stopped.folder, stop=stop).stopped
    write_vectors(tmp_path / "teacher.npz", rows[::-1], data.image_ids)
    with pytest.raises(InputError, match=r"teacher\.npz has changed since the run began"):
        resume(stopped.folder)


@pytest.mark.end_to_end
def test_chunks_do_not_change_a_step(taught: dict[str, Any]) -> None:
    """The gradients of one step are those of the whole batch. Fails for terms of a chunk alone."""
    once = {"max_steps": 1, "interpolate": False, "ema": 0.0, "epochs": 1, "pairs": 1.0}
    folders = [run(taught, chunk=size, name=f"chunk{size}", **once).folder for size in (2, 6)]
    lines = [next(line for line in metrics(f) if "loss" in line) for f in folders]
    for name in ("loss", "gradient_norm", "contrastive_loss", "relational_loss"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name


def trained(options: dict[str, Any], name: str) -> None:
    train(TrainConfig.from_mapping({**options, "name": name}))


def trained_by_one_of_two(rank: int, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trained(options, "two")
    dist.destroy_process_group()


@pytest.mark.end_to_end
@pytest.mark.slow  # three processes import the towers' libraries
def test_two_processes_equal_one(taught: dict[str, Any], tmp_path: Path) -> None:
    """Each computes its share of the teacher's vectors, and the loss over both processes' rows."""
    taught |= {"epochs": 1, "pairs": 0.5, "interpolate": False, "chunk": 2, "workers": 1}
    taught = {name: str(v) if isinstance(v, Path) else v for name, v in taught.items()}
    torch.multiprocessing.spawn(trained_by_one_of_two, (str(tmp_path), taught), nprocs=2)
    trained(taught, "one")
    one, two = (metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "cosine_loss", "contrastive_loss", "gradient_norm", "validation_loss"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-3), name
