"""Learning from labels: batches of several pictures of each label, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_training_resume import final_state, train_with_a_kill
from training_runs import metrics, run, weights

from clipkit.errors import InputError
from clipkit.losses import losses_of
from clipkit.training import TrainConfig
from clipkit.training.methods.labels import grouped
from clipkit.training.run_folder import RunFolder


def order_of(labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    return grouped(labels, each, np.random.default_rng(seed))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=80),
    st.integers(2, 5),
    st.integers(2, 20),
    st.integers(0, 3),
)
def test_a_batch_has_several_pictures_of_each_label(
    numbers: list[int], each: int, batch: int, seed: int
) -> None:
    """Every picture once an epoch, so never twice in a batch; of every label of a batch at least
    `each`, or all that there are, but of the two at its ends. The same order from the same seed."""
    labels = np.array(numbers)
    order = order_of(labels, each, seed)
    assert sorted(order) == list(range(len(labels)))
    assert (order == order_of(labels, each, seed)).all()
    counts = np.bincount(labels)
    for start in range(0, len(order) - batch + 1, batch):
        own = labels[order[start : start + batch]]
        few = [n for n in set(own.tolist()) if (own == n).sum() < min(each, counts[n])]
        assert set(few) <= {own[0], own[-1]}


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 5), st.integers(0, 3))
def test_even_labels_make_even_batches(classes: int, each: int, groups: int, seed: int) -> None:
    """P labels of as many pictures, P x K a batch: each batch has exactly K of each of the P."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), groups * each))
    for batch in np.split(labels[order_of(labels, each, seed)], groups):
        assert (np.bincount(batch, minlength=classes) == each).all()


def test_a_rare_label_is_spread_over_the_epoch() -> None:
    """8 of 104 pictures in two groups: one in each half. Other epochs differ."""
    labels = np.array([0] * 96 + [1] * 8)
    for seed in range(5):
        first = labels[order_of(labels, 4, seed)][:52]
        assert (first == 1).sum() in (3, 4, 5)
    assert (order_of(labels, 4, 0) != order_of(labels, 4, 1)).any()


# ---- whole runs


SHADES = {"dark": 0, "bright": 24}


def write_shades(
    folder: Path, *, labels: tuple[str, ...] = ("dark", "bright"), counts: tuple[int, int] = (14, 8)
) -> Path:
    """Noise that is dark or bright, with that label and no caption; one picture has no label."""
    for split, count in zip(("train", "validation"), counts, strict=True):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            label = labels[i % len(labels)]
            coarse = np.random.default_rng(i).integers(0, 96, (8, 8, 3)) + SHADES[label]
            picture = Image.fromarray(coarse.astype(np.uint8))
            picture.resize((40, 32)).save(folder / split / f"{i}.png")
            line = {"file_name": f"{i}.png", "image_id": f"{split}{i:04}", "captions": [""]}
            lines.append(json.dumps({**line, "label": label if i < count - 1 else ""}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def labelled(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    data = write_shades(tmp_path / "shades")
    return {**options, "data": data, "method": "labels", "per_class": 2}


@pytest.mark.end_to_end
@pytest.mark.parametrize("loss", losses_of("labels"))
def test_every_loss_of_labels_trains_the_picture_tower_alone(
    labelled: dict[str, Any], loss: str
) -> None:
    start = weights(Path(labelled["start"]))
    summary = run(labelled, loss=loss, epochs=1, keep="last")
    assert "1 training pictures without a label were left out" in summary.notes
    assert summary.before is not None and set(summary.before) == {
        f"neighbours/acc@{k}nn" for k in (1, 5, 10)
    }
    changed = {n for n, value in weights(summary.checkpoint).items() if not value.equal(start[n])}
    assert changed and all(name.startswith("visual.") for name in changed)
    assert all(np.isfinite(line["loss"]) for line in metrics(summary.folder) if "loss" in line)


@pytest.mark.end_to_end
def test_without_captions_heads_learn_from_features(
    labelled: dict[str, Any], tmp_path: Path
) -> None:
    """There are no texts to encode, and the loss falls."""
    data = write_shades(tmp_path / "more", counts=(40, 24))
    changes = {"recipe": "heads", "epochs": 60, "batch": 16, "drift": 0.0}
    lines = metrics(run(labelled, data=data, **changes).folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])


@pytest.mark.end_to_end
def test_a_killed_run_with_vectors_of_classes_ends_as_if_it_had_not_been(
    labelled: dict[str, Any], tmp_path: Path
) -> None:
    labelled |= {"checkpoint_every": 1, "loss": "normsoftmax", "drift": 0.05}
    whole = run(labelled)
    config = TrainConfig.from_mapping({**labelled, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", 3)
    expected, got = final_state(whole.folder), final_state(again.folder)
    assert "/parameters/class_embeddings" in expected and got.keys() == expected.keys()
    for path, value in expected.items():
        same = torch.equal(got[path], value) if isinstance(value, torch.Tensor) else None
        assert got[path] == value if same is None else same, path


@pytest.mark.end_to_end
def test_one_label_teaches_nothing(labelled: dict[str, Any], tmp_path: Path) -> None:
    data = write_shades(tmp_path / "dark", labels=("dark",))
    with pytest.raises(InputError, match="have the label 'dark'; learning from labels needs two"):
        run(labelled, data=data)


def one_of_two(rank: int, folder: str, options: dict[str, Any]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run(options, name="two")
    dist.destroy_process_group()


@pytest.mark.end_to_end
@pytest.mark.slow  # three processes import the towers' libraries
def test_two_processes_equal_one(labelled: dict[str, Any], tmp_path: Path) -> None:
    labelled |= {
        "loss": "normsoftmax",
        "epochs": 1,
        "chunk": 2,
        "flip": False,
        "interpolate": False,
    }
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), labelled), nprocs=2)
    run(labelled, name="one")
    one, two = (RunFolder(tmp_path / "runs" / name).load() for name in ("one", "two"))
    assert one is not None and two is not None
    start = weights(Path(labelled["start"]))
    for name, tensor in one["parameters"].items():
        # AdamW's first steps divide a gradient by its size: where it is about 0, so is its sign.
        moved = (tensor - start[name]).abs().mean() if name in start else 1e-3
        assert (two["parameters"][name] - tensor).abs().mean() <= 0.02 * moved, name
