"""Whole runs on tiny towers: exports, resuming after a kill, refusals, what is written down."""

from __future__ import annotations

import io
import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training_data import write_split

from clipkit import checkpoint, towers
from clipkit.errors import DatasetError, InputError
from clipkit.training import Progress, RunSummary, TrainConfig, resume, train
from clipkit.training.checkpoint import RunFolder

Checkpoint = Callable[..., Path]
WORDS = "red green blue cake car dog cat penguin guitar tree house boat".split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 training and 6 validation pictures of noise, two captions each, some of them equal."""

    def noise(width: int, height: int, seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("validation", 6)):
        captions = [[" ".join(rng.choice(WORDS, 2)) for _ in range(2)] for _ in range(count)]
        write_split(folder, captions, noise, split=split)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint) -> Path:
    """OpenCLIP's ViT of 32 pixels and a Hugging Face text tower, which has dropout: 60 thousand
    parameters, so that many states are written quickly."""
    import open_clip.model

    source, folder = tiny_checkpoint("timm-hf"), tmp_path_factory.mktemp("small")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    model_cfg, preprocess_cfg = checkpoint.read_config(source)
    model_cfg["vision_cfg"] = checkpoint.read_config(tiny_checkpoint("vit"))[0]["vision_cfg"]
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    text = {**model_cfg["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CustomTextCLIP(**{**model_cfg, "text_cfg": text})
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def options(dataset: Path, tmp_path: Path, small: Path) -> dict[str, Any]:
    """Of a short run: 3 epochs of 2 batches of 6, in chunks of 4."""
    return {
        "data": dataset,
        "out": tmp_path / "runs",
        "name": "run",
        "start": str(small),
        "recipe": "full",
        "epochs": 3,
        "batch": 6,
        "chunk": 4,
        "learning_rate": 1e-3,
        "device": "cpu",
        "workers": 2,
        "patience": 0,
        "tensorboard": False,
    }


def run(options: dict[str, Any], **changes: Any) -> RunSummary:
    return train(TrainConfig.from_mapping({**options, **changes}))


def weights(folder: Path | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return load_file(folder / "open_clip_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def altered(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of a checkpoint with other weights."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = weights(source)
    change(tensors)
    save_file(tensors, target / "open_clip_model.safetensors")
    return str(target)


# ---- going on after a kill


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state, by its path."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    parts = [leaves(part, f"{path}/{key}") for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def final_state(folder: Path) -> dict[str, Any]:
    saved = RunFolder(folder).load()
    assert saved is not None
    state, best = saved
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return leaves({**fields, "best": best, "seconds": None})


class Killed(BaseException):
    """As the operating system does it: nothing is caught, nothing tidied up."""


def train_with_a_kill(config: TrainConfig, folder: Path, step: int) -> RunSummary:
    def kill(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == step:
            raise Killed

    with pytest.raises(Killed):
        train(config, on_progress=kill)
    (folder / "checkpoints" / "step_000099").mkdir()  # begun, and not finished
    (folder / "checkpoints" / "step_000099" / "training_state.partial").write_bytes(b"PK")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    return resume(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "full", "dropout": True, "hard_negatives": 2},
        {"recipe": "lora", "hardness": 0.3, "hard_negatives": 1, "hard_negatives_every": 2},
        {"recipe": "heads", "ema": 0.9},
    ],
    ids=["full", "lora", "heads"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Model, optimizer, mean of the weights, best, random states, negatives: every bit.

    Fails for any version that forgets one of them, or the position within the epoch.
    """
    options |= {"checkpoint_every": 1, **changes}
    whole = run(options)
    expected = final_state(whole.folder)
    killed_at = int(np.random.default_rng(len(changes)).choice([2, 4]))  # amid an epoch
    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", killed_at)
    got = final_state(again.folder)
    assert got.keys() == expected.keys() and again.steps == whole.steps == 6
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[path], value), path
        else:
            assert got[path] == value, path
    assert again.encoder_id == whole.encoder_id and again.after == whole.after
    lines = metrics(again.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(options)
    stop = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == 3:
            stop.set()

    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    stopped = train(config, on_progress=ask, stop=stop)
    assert stopped.stopped and stopped.steps == 3 and stopped.checkpoint is None
    finished = resume(stopped.folder)
    assert not finished.stopped and finished.encoder_id == whole.encoder_id


def test_only_what_began_is_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    done = run(options, max_steps=1)
    with pytest.raises(
        InputError, match="holds a run already; resume it, or give this one another"
    ):
        run(options)
    with pytest.raises(InputError, match=r"is not a training run: config\.json cannot be read"):
        resume(tmp_path / "nothing")
    path = done.folder / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "data": {"pictures": 3, "fingerprint": "x"}}))
    with pytest.raises(InputError, match=r"began with data .*'x'.*start a new run"):
        resume(done.folder)


# ---- what comes out


@pytest.mark.parametrize("recipe", ["heads", "lit", "lora", "full"])
def test_the_checkpoint_is_the_model_that_was_trained(
    options: dict[str, Any], tiny_checkpoint: Checkpoint, recipe: str
) -> None:
    """Identity travels with the weights: the same config, activation and preprocessing included,
    the same tokenizer, the same names; and the weights are the last ones, bit for bit.

    Fails for an export with OpenCLIP's defaults: quick_gelu, resize mode and interpolation differ.
    """
    start = tiny_checkpoint("vit-quickgelu")
    options |= {"start": str(start), "recipe": recipe, "interpolate": False, "ema": 0.0}
    # Nothing to choose by: the last weights are the best.
    options["data"] = without_validation(Path(options["data"]), options["out"].parent / "d")
    summary = run(options)
    assert summary.checkpoint is not None
    assert checkpoint.read_config(summary.checkpoint)[0] == checkpoint.read_config(start)[0]
    loaded = towers.load(str(summary.checkpoint), device="cpu", precision="float32")
    parent = towers.load(str(start), device="cpu", precision="float32")
    assert loaded.config == parent.config and loaded.encoder_id == summary.encoder_id
    assert loaded.encoder_id != parent.encoder_id == summary.parent_id

    exported, before = weights(summary.checkpoint), weights(start)
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in before.items()}
    saved = RunFolder(summary.folder).load()
    assert saved is not None
    last = saved[0].parameters
    changed = {n for n, tensor in exported.items() if not torch.equal(tensor, before[n])}
    if recipe == "lora":
        name = "transformer.resblocks.0.attn"
        adapter = f"{name}.parametrizations.in_proj_weight.0"
        update = (last[f"{adapter}.up"] @ last[f"{adapter}.down"]).view(96, 32)
        assert torch.equal(
            exported[f"{name}.in_proj_weight"], before[f"{name}.in_proj_weight"] + update
        )
    else:
        assert changed <= set(last)
        assert all(torch.equal(exported[name], last[name]) for name in last)
    assert "visual.proj" in changed or recipe == "lit"
    provenance = json.loads((summary.checkpoint / "clipkit.json").read_text())
    assert provenance["encoder_id"] == summary.encoder_id
    assert provenance["parent"]["encoder_id"] == summary.parent_id
    assert provenance["data"]["pictures"] == 14 and provenance["versions"]["torch"]


def without_validation(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "train").symlink_to(source / "train")
    return target


def test_it_learns(tmp_path: Path, small: Path) -> None:
    """Twelve plain colours and their names: from chance to nearly all right."""
    data = tmp_path / "colours"
    hues = [tuple(int(v) for v in np.random.default_rng(i).integers(0, 256, 3)) for i in range(12)]

    def plain(width: int, height: int, seed: int) -> Image.Image:
        return Image.new("RGB", (width, height), hues[seed])

    for split in ("train", "validation"):
        write_split(data, [[word] for word in WORDS], plain, split=split)
    config = TrainConfig.from_mapping(
        {
            "data": data,
            "out": tmp_path,
            "start": str(small),
            "recipe": "full",
            "epochs": 40,
            "batch": 12,
            "learning_rate": 3e-3,
            "eval_every": 20,
            "device": "cpu",
            "tensorboard": False,
        }
    )
    summary = train(config)
    assert summary.before is not None and summary.after is not None
    assert summary.before["text_to_image/R@1"] < 0.35
    assert summary.after["text_to_image/R@1"] > 0.8
    assert summary.folder.name.startswith("full-")


def test_a_run_that_gets_no_better_leaves_the_start(options: dict[str, Any]) -> None:
    """A rate of nearly nothing: the first evaluation is the best of the tuned, the next is no better,
    patience ends it; and no share of the tuned is better than the start."""
    summary = run(options, learning_rate=1e-12, patience=1, epochs=5)
    assert summary.best_step == 0 and summary.steps == 4
    assert summary.encoder_id == summary.parent_id and summary.before == summary.after
    assert "stopped early after step 4 of 10" in summary.words
    assert any("nothing was better than the start" in words for words in summary.words)


def test_what_is_written_and_told(options: dict[str, Any]) -> None:
    told: list[Progress] = []
    torch.manual_seed(11)
    before = torch.get_rng_state()
    config = TrainConfig.from_mapping({**options, "recipe": "heads"})
    summary = train(config, on_progress=told.append, command="clipkit train --x")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is theirs
    training = [p for p in told if p.phase == "training"]
    assert [p.done for p in training] == [1, 2, 3, 4, 5, 6] and training[-1].eta_seconds == 0
    assert {p.phase for p in told} >= {"features", "evaluating", "training", "saving"}
    facts = json.loads((summary.folder / "config.json").read_text())
    assert facts["command"] == "clipkit train --x" and facts["batch"] == 6
    assert TrainConfig.from_mapping(facts["config"]).recipe == "heads"
    lines = metrics(summary.folder)
    assert sum("loss" in line for line in lines) == 6
    evaluations = [line for line in lines if "text_to_image/R@1" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    assert {"variance", "effective_rank", "alignment", "uniformity"} <= evaluations[0].keys()
    assert json.loads((summary.folder / "summary.json").read_text())["steps"] == 6
    assert [p.name for p in (summary.folder / "checkpoints").iterdir()] == ["step_000006"]


def test_features_are_computed_once_for_an_encoder_and_its_data(options: dict[str, Any]) -> None:
    """Fails for a cache that is keyed by a path: other weights under the same name reuse it."""
    phases: list[str] = []

    def again(**changes: Any) -> int:
        phases.clear()
        config = TrainConfig.from_mapping({**options, "recipe": "heads", "max_steps": 1, **changes})
        train(config, on_progress=lambda p: phases.append(p.phase))
        return phases.count("features")

    assert again(name="a") > 0
    assert again(name="b") == 0
    start = Path(options["start"])
    moved = altered(start, options["out"] / "moved", lambda t: t["visual.conv1.weight"].mul_(2))
    assert again(name="c", start=moved) > 0


def test_a_run_stopped_while_features_are_computed_goes_on_from_them(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first chunk, then the second chunk cut off as by a kill: the resumed run
    computes the rest only, and ends with the unbroken run's weights."""
    monkeypatch.setattr(towers.DualEncoder, "preferred_batch", 4)
    options = {**options, "recipe": "heads"}
    unbroken = run({**options, "name": "unbroken"})
    shutil.rmtree(options["out"] / ".features")
    stop = threading.Event()
    stop.set()
    stopped = train(TrainConfig.from_mapping({**options, "name": "broken"}), stop=stop)
    assert stopped.stopped and stopped.checkpoint is None and stopped.steps == 0
    (partial,) = (options["out"] / ".features").glob("*.partial")
    whole = partial.read_bytes()
    partial.write_bytes(whole + whole[: len(whole) // 2])
    told: list[Progress] = []
    resumed = resume(stopped.folder, on_progress=told.append)
    assert len(np.load(io.BytesIO(whole))) == 4
    assert [p.done for p in told if p.phase == "features"][:3] == [8, 12, 14]
    assert resumed.encoder_id == unbroken.encoder_id
    assert not list((options["out"] / ".features").glob("*.partial"))


def test_the_mean_of_the_weights_is_what_comes_out(options: dict[str, Any], tmp_path: Path) -> None:
    """Fails for a mean that is kept and never used, or never updated."""
    data = without_validation(Path(options["data"]), tmp_path / "d")
    summary = run(options, data=data, ema=0.9)
    saved = RunFolder(summary.folder).load()
    assert saved is not None
    exported = weights(summary.checkpoint)
    mean, last = saved[0].ema["visual.proj"], saved[0].parameters["visual.proj"]
    assert torch.equal(exported["visual.proj"], mean) and not torch.equal(mean, last)
    assert not torch.equal(mean, weights(Path(options["start"]))["visual.proj"])


# ---- the temperature


def test_infonce_keeps_the_scale_within_one_hundred(
    options: dict[str, Any], tmp_path: Path
) -> None:
    start = Path(options["start"])

    def hot(tensors: dict[str, torch.Tensor]) -> None:
        tensors["logit_scale"].fill_(math.log(100))
        tensors["visual.proj"].mul_(-1)

    summary = run(
        options,
        start=altered(start, tmp_path / "hot", hot),
        data=without_validation(Path(options["data"]), tmp_path / "d"),
        learning_rate=0.1,
        ema=0.0,
    )
    assert weights(summary.checkpoint)["logit_scale"] <= math.log(100) + 1e-6


@pytest.mark.parametrize("loss", ["siglip", "infonce"])
def test_a_siglip_scale_is_not_cut(
    options: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path, loss: str
) -> None:
    """SigLIP's checkpoints carry 4.72, a scale of 112. Fails for the version that clamps at ln 100
    after the first step: the model would change at once, whatever the gradient says."""
    start = altered(
        tiny_checkpoint("siglip"), tmp_path / "s", lambda t: t["logit_scale"].fill_(4.72)
    )
    data = without_validation(Path(options["data"]), tmp_path / "d")
    summary = run(options, start=start, data=data, loss=loss, learning_rate=1e-9, max_steps=1)
    assert weights(summary.checkpoint)["logit_scale"].item() == pytest.approx(4.72, abs=1e-6)


# ---- what is refused


def test_too_few_pictures_are_refused_before_anything_is_written(options: dict[str, Any]) -> None:
    """Fails for a run that drops the only, partial batch and ends well after no step."""
    with pytest.raises(DatasetError, match=r"has 14 training pictures.*fewer than one batch of 15"):
        run(options, batch=15)
    assert not (options["out"] / "run").exists()


def test_a_loss_that_is_not_a_number_names_the_step_and_the_pictures(
    options: dict[str, Any],
) -> None:
    """One picture's features are made NaN: the run stops in the step that meets it and names it.
    Fails for a trainer that goes on: every weight would be NaN one step later."""
    options |= {"recipe": "heads", "batch": 14}
    run(options, name="first", max_steps=1)
    (cached,) = [
        path
        for path in (options["out"] / ".features").glob("*-pictures.npy")
        if len(np.load(path)) == 14
    ]
    features = np.load(cached)
    features[5] = np.nan
    np.save(cached, features)
    with pytest.raises(
        InputError, match=r"the loss at step 1 is not finite; pictures: train/5\.png; "
    ):
        run(options, name="second")


def test_no_validation_is_said(options: dict[str, Any], tmp_path: Path) -> None:
    data = without_validation(Path(options["data"]), tmp_path / "d")
    summary = run(options, data=data, max_steps=1, recipe="lit")
    assert summary.after is None and summary.alpha == 1.0
    assert any("no validation split" in words for words in summary.words)


def test_half_precision_and_activation_checkpointing_train_every_layer(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Fails for one autocast around both passes: weights cast in the first, without a graph, would
    be taken from its cache in the second, and get no gradient."""
    data = without_validation(Path(options["data"]), tmp_path / "d")
    options |= {"data": data, "max_steps": 1, "ema": 0.0, "learning_rate": 1e-2}
    summary = run(options, precision="bfloat16", activation_checkpointing=True)
    before, after = weights(Path(options["start"])), weights(summary.checkpoint)
    layers = [name for name in before if name.endswith("weight") and "word_emb" not in name]
    for name in layers:
        assert not torch.equal(before[name], after[name])
    plain = weights(run(options, name="plain").checkpoint)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    torch.testing.assert_close(after[name], plain[name], rtol=0, atol=0.02)
    with pytest.raises(InputError, match="float16 does not train on a CPU"):
        run(options, name="half", precision="float16")
