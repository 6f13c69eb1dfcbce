"""Whole runs on tiny towers: exports, files, the temperature, refusals, losses."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import altered, metrics, run, weights, without_validation, write_colours

from clipkit import checkpoint, strength, towers
from clipkit.errors import DatasetError, InputError
from clipkit.losses import LOSSES, Loss
from clipkit.options import option
from clipkit.training import Progress, TrainConfig, resume, train
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch
from clipkit.training.methods.method import Method, Setup
from clipkit.training.registry import METHODS, MethodEntry
from clipkit.training.run_folder import RunFolder

pytestmark = pytest.mark.end_to_end

Checkpoint = Callable[..., Path]

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
    last = saved["parameters"]
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


def test_it_learns(tmp_path: Path, small_towers: Path) -> None:
    """Twelve plain colours and their names: from chance to nearly all right."""
    data = write_colours(tmp_path / "colours")
    config = TrainConfig.from_mapping(
        {
            "data": data,
            "out": tmp_path,
            "start": str(small_towers),
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
    assert "stopped early after step 4 of 10: validation did not improve" in summary.notes
    assert any("no trained weights were better" in note for note in summary.notes)


def test_strengths_are_fitted_on_the_validation_split(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 captions are too few, and the start is not calibrated; with a lower limit they are enough.
    The file does not change what identifies the model. What the library's size tells, a validation
    split cannot know: it is the usual, or the start's."""
    rate = {"learning_rate": 1e-2, "interpolate": False, "epochs": 1}
    summary = run(options, **rate)
    assert not (summary.checkpoint / strength.FILE).exists()
    monkeypatch.setattr(strength, "FEWEST_CAPTIONS", 12)
    summary = run(options, **rate, name="calibrated")
    assert summary.encoder_id != summary.parent_id
    calibration = strength.read(str(summary.folder), summary.encoder_id)
    assert calibration is not None and calibration.fitted_on == {"captions": 12, "pictures": 6}
    assert calibration.size == strength.USUAL_SIZE
    start = tmp_path / "start"
    shutil.copytree(options["start"], start)
    replace(calibration, encoder_id=summary.parent_id, size=0.5).write(start)
    summary = run(options, **rate, name="sized", start=str(start))
    fitted = strength.read(str(summary.folder), summary.encoder_id)
    assert fitted is not None and fitted.size == 0.5 and fitted.fitted_on == calibration.fitted_on
    # a run of too few captions from there keeps the start's
    monkeypatch.undo()
    summary = run(options, **rate, name="again", start=str(summary.folder))
    inherited = strength.read(str(summary.folder), summary.encoder_id)
    assert inherited is not None and inherited.cosine == fitted.cosine
    assert "inherited_from" in inherited.fitted_on


def test_files_and_progress(options: dict[str, Any]) -> None:
    updates: list[Progress] = []
    torch.manual_seed(11)
    before = torch.get_rng_state()
    config = TrainConfig.from_mapping({**options, "recipe": "heads"})
    summary = train(config, on_progress=updates.append, command="clipkit train --x")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is theirs
    training = [p for p in updates if p.phase == "training"]
    assert [p.done for p in training] == [1, 2, 3, 4, 5, 6] and training[-1].eta_seconds == 0
    assert {p.phase for p in updates} >= {"features", "evaluating", "training", "saving"}
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


def test_the_mean_of_the_weights_is_what_comes_out(options: dict[str, Any], tmp_path: Path) -> None:
    """Fails for a mean that is stored and never used, or never updated."""
    data = without_validation(Path(options["data"]), tmp_path / "d")
    summary = run(options, data=data, ema=0.9)
    saved = RunFolder(summary.folder).load()
    assert saved is not None
    exported = weights(summary.checkpoint)
    mean, last = saved["ema"]["visual.proj"], saved["parameters"]["visual.proj"]
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


@pytest.mark.parametrize("recipe", ["heads", "lit"])
def test_a_model_without_a_bias_begins_the_sigmoid_loss_near_its_least(
    options: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """A scale of 4 over random towers. Were all logits the same, a row of B would cost with the fitted
    bias ln B + (B - 1) ln(B / (B - 1)), below ln B + 1; the rest is noise of the cosines. Fails for
    SigLIP's own bias of -10: its own pair costs a row 6 at least."""
    start = altered(
        Path(options["start"]), tmp_path / "s", lambda t: t["logit_scale"].fill_(math.log(4))
    )
    summary = run(options, recipe=recipe, start=start, loss="siglip", max_steps=1, batch=6)
    loss = next(line["loss"] for line in metrics(summary.folder) if "loss" in line)
    assert loss < math.log(6) + 2


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


def test_a_missing_validation_split_is_noted(options: dict[str, Any], tmp_path: Path) -> None:
    data = without_validation(Path(options["data"]), tmp_path / "d")
    summary = run(options, data=data, max_steps=1, recipe="lit")
    assert summary.after is None and summary.alpha == 1.0
    assert any("no validation split" in note for note in summary.notes)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SevenOptions:
    added: float = option("what is added", 1.0, low=0)


def test_a_loss_registered_from_outside_is_trained_with(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss 7 + the sum of squares of the pictures' unit rows: 7 + 6 for a batch of six. Nothing but
    its entry in LOSSES is needed to name it and its option. Fails for a configuration with a closed
    list."""
    batches: list[tuple[int, ...]] = []

    def seven(
        images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        batches.append((*images.shape, *texts.shape))
        assert options["added"] == 7 and "hardness" not in options
        return options["added"] + images.square().sum() + 0 * (texts.sum() + logit_scale)

    entry = Loss(seven, options=SevenOptions)
    monkeypatch.setitem(LOSSES, "seven", entry)
    with pytest.raises(
        InputError, match=r"added is 7.0, but loss infonce has no such option.*use loss seven"
    ):
        run(options, loss="infonce", added=7)
    summary = run(options, loss="seven", added=7, max_steps=1, recipe="lit")
    assert batches == [(6, 24, 6, 24)]
    (line,) = [line for line in metrics(summary.folder) if "loss" in line]
    assert line["loss"] == pytest.approx(13, abs=1e-5)
    assert json.loads((summary.folder / "config.json").read_text())["loss"] == "seven"


@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("recipe", ["full", "heads"])
def test_pictures_that_cannot_be_read_are_left_out_and_named(
    options: dict[str, Any], tmp_path: Path, recipe: str, hard_negatives: int
) -> None:
    """A training and a validation picture are no pictures: the run goes on with others, batches of the
    same size, and so does one that is resumed; so does a search for hard negatives. Fails for a version
    that ends at the first."""
    data = tmp_path / "broken"
    shutil.copytree(options["data"], data)
    for split in ("train", "validation"):
        sorted((data / split).glob("*.png"))[3].write_bytes(b"no picture")
    options |= {"data": data, "recipe": recipe, "checkpoint_every": 1}
    options["hard_negatives"] = hard_negatives
    whole = run(options, name="whole")
    (training,) = [note for note in whole.notes if "1 training pictures were left out: " in note]
    assert "train/" in training and ".png: " in training
    assert any("1 validation pictures were left out: validation/" in note for note in whole.notes)
    stop = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == 3:
            stop.set()

    config = TrainConfig.from_mapping({**options, "name": "parts"})
    parts = train(config, on_progress=ask, stop=stop)
    again = resume(parts.folder)
    assert again.encoder_id == whole.encoder_id and again.after == whole.after
    sorted((data / "train").glob("*.png"))[5].write_bytes(b"no picture")
    shutil.rmtree(options["out"] / ".features", ignore_errors=True)
    with pytest.raises(DatasetError, match=r"2 of 14 pictures of .*broken cannot be read: train/"):
        run(options, name="too many")


class Farther(Method):
    """Only pictures: move their mean vector away from where it is; counts its steps."""

    sides = frozenset(("image",))
    text_views = 0

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.steps = 0

    @property
    def shared(self) -> dict[str, torch.nn.Parameter]:
        return {"gain": self.gain}

    def views(self, batch: Batch) -> list[View]:
        return [View(self.setup.towers.images, batch.pictures[0], side="image")]

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        assert len(rows) == 1 and rows[0].shape == (len(batch.plan.pictures), 24)
        assert not batch.texts
        return self.gain * rows[0].mean(0).square().sum() * self.setup.options.weight

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:
        self.steps += 1
        assert step == self.steps and not rows[0].requires_grad

    def metrics(self) -> dict[str, float]:
        return {"own_steps": self.steps}

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.steps = state["steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FartherOptions:
    weight: float = option("factor of the loss", 1.0, above=0)


def test_a_method_registered_from_outside_trains_and_resumes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry in METHODS is enough for its name, its option, its default and its saved state; what is
    not of its sides stays as it is."""
    entry = MethodEntry(
        Farther,
        "farther",
        recipes=("full", "lora"),
        options=FartherOptions,
        defaults={"learning_rate": 1e-2},
        unused=frozenset({"text_rate"}),
    )
    monkeypatch.setitem(METHODS, "farther", entry)
    options |= {"method": "farther", "recipe": "full", "interpolate": False, "ema": 0.0}
    with pytest.raises(
        InputError, match="recipe heads cannot learn by method farther; use recipe ful"
    ):
        run(options, recipe="heads")
    with pytest.raises(InputError, match=r"text_rate is 0.5, but method farther does not use it"):
        run(options, text_rate=0.5)
    with pytest.raises(InputError, match="loss is 'infonce'; use one of auto"):
        run(options, loss="infonce")
    with pytest.raises(InputError, match=r"weight is 2.0, but method pairs has no such option"):
        run({**options, "method": "pairs"}, weight=2)
    options["data"] = without_validation(Path(options["data"]), options["out"].parent / "d")
    whole = run(options, weight=2, name="whole")
    lines = [line for line in metrics(whole.folder) if "loss" in line]
    assert [line["own_steps"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = weights(Path(options["start"])), weights(whole.checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("visual.") for name in changed)
    stop = threading.Event()
    config = TrainConfig.from_mapping({**options, "weight": 2, "name": "parts"})
    train(config, stop=stop, on_progress=lambda p: stop.set() if p.done == 1 else None)
    parts = resume(options["out"] / "parts")
    assert not parts.stopped
    again = weights(parts.checkpoint)
    assert all(torch.equal(after[name], again[name]) for name in after)
