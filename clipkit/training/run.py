"""A training run from its configuration to a checkpoint: `train`, and `resume` after a kill."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from clipkit import checkpoint, towers
from clipkit.errors import InputError
from clipkit.training import distributed
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures, fitted_batch, has_split
from clipkit.training.distributed import own_generators
from clipkit.training.frozen_towers import FeaturesStopped, FrozenTowers
from clipkit.training.inputs import Inputs, PictureInputs
from clipkit.training.loop import Job, Outcome, Progress, fit
from clipkit.training.recipes import Trained, choose_parameters, merge_adapters
from clipkit.training.run_folder import RunFolder, write_json
from clipkit.training.towers import Towers, TrainableTowers, checkpoint_activations, loss_of
from clipkit.training.validation import Scores, evaluate
from clipkit.training.weights import ALPHAS, Mixture, choose_alpha, fitted_drift


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run came to. Recalls are fractions by name, of the validation split, if there is one."""

    folder: Path
    checkpoint: Path | None  # an OpenCLIP folder; None if the run was stopped and can be resumed
    encoder_id: str | None
    parent_id: str
    recipe: str
    steps: int
    best_step: int  # 0: the start
    stopped: bool
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    alpha: float  # weight of the tuned against the start; 1 if they were not mixed
    trained_parameters: int
    total_parameters: int
    seconds: float
    words: tuple[str, ...]  # what a person should know, warnings included


def stopped_before_training(
    run: RunFolder, config: TrainConfig, model: TrainableTowers, trained: Trained
) -> RunSummary:
    """Nothing was trained yet, and `resume` begins where the run was."""
    return RunSummary(
        folder=run.path,
        checkpoint=None,
        encoder_id=None,
        parent_id=model.encoder.encoder_id,
        recipe=config.recipe,
        steps=0,
        best_step=0,
        stopped=True,
        before=None,
        after=None,
        alpha=1.0,
        trained_parameters=trained.count,
        total_parameters=trained.total,
        seconds=0.0,
        words=("the features that were computed are kept",),
    )


def finish(
    job: Job, model: TrainableTowers, outcome: Outcome, facts: Mapping[str, Any]
) -> RunSummary:
    """From the best weights to a checkpoint: merge, mix with the start, export, write down."""
    config, run = job.config, job.folder
    before = outcome.start_scores.recall if outcome.start_scores else None
    words = [*_words(job, model, outcome), *outcome.warnings]
    after = outcome.best_scores.recall if outcome.best_scores else None
    encoder_id, mixture, best_step = None, Mixture(1.0, {}), outcome.best_step
    if not outcome.stopped:
        with torch.no_grad():
            for name, parameter in job.trained.named.items():
                parameter.copy_(outcome.best[name])
        job.towers.mode(False)
        merge_adapters(model.model)
        if job.validation is not None:
            mixture = _mix(job, model, outcome)
            best_step = best_step if mixture.alpha > 0 else 0
            after = mixture.scores[mixture.alpha].recall
            words.append(
                f"the weights are {mixture.alpha:.0%} tuned, {1 - mixture.alpha:.0%} start"
                if mixture.alpha > 0
                else "nothing was better than the start on the validation split: it is unchanged"
            )
        job.on_progress(Progress("saving", outcome.step, job.steps))
        if distributed.rank() == 0:
            provenance = {
                "parent": {"spec": config.start, "encoder_id": model.encoder.encoder_id},
                "recipe": config.recipe,
                "data": facts["data"],
                "metrics": {"validation_before": before, "validation": after},
                "alpha": mixture.alpha,
                "steps": outcome.step,
                "best_step": best_step,
                "seconds": round(outcome.seconds, 1),
                "versions": facts["versions"],
                "command": facts["command"],
            }
            model.encoder.save(run.checkpoint, provenance=provenance)
        distributed.collect(None)  # none goes on before it is written
        encoder_id = checkpoint.identify(str(run.checkpoint))
    summary = RunSummary(
        folder=run.path,
        checkpoint=None if outcome.stopped else run.checkpoint,
        encoder_id=encoder_id,
        parent_id=model.encoder.encoder_id,
        recipe=config.recipe,
        steps=outcome.step,
        best_step=best_step,
        stopped=outcome.stopped,
        before=before,
        after=after,
        alpha=mixture.alpha,
        trained_parameters=job.trained.count,
        total_parameters=job.trained.total,
        seconds=outcome.seconds,
        words=tuple(words),
    )
    if distributed.rank() == 0 and not outcome.stopped:
        content = {item.name: getattr(summary, item.name) for item in fields(summary)}
        content |= {"mixture": {str(a): s.recall for a, s in mixture.scores.items()}}
        write_json(run.path / "summary.json", json.loads(json.dumps(content, default=str)))
    return summary


def _mix(job: Job, model: TrainableTowers, outcome: Outcome) -> Mixture:
    """Mix with the start as the validation split says, or take one of the two."""
    assert job.validation is not None and outcome.start_scores is not None
    first = towers.load(job.config.start, device="cpu", precision="float32").model.state_dict()
    last = model.model.state_dict()
    tuned = {
        name: value.clone()
        for name, value in last.items()
        if value.is_floating_point() and not torch.equal(value.cpu(), first[name])
    }
    validation = job.validation
    alphas = ALPHAS if job.config.interpolate else (1.0,)

    def scores() -> Scores:
        job.on_progress(Progress("mixing", 0, len(alphas)))
        return evaluate(job.towers, validation)

    at_start = outcome.start_scores
    return choose_alpha(model.model, first, tuned, scores, at_start=at_start, alphas=alphas)


def _words(job: Job, model: TrainableTowers, outcome: Outcome) -> list[str]:
    share = job.trained.count / job.trained.total
    words = [
        f"{job.trained.count:,} of {job.trained.total:,} parameters ({share:.1%}) were trained"
    ]
    if job.config.drift:
        words.append(f"matrices were kept within {job.config.drift:.1%} of their size at the start")
    if job.config.recipe != "heads" and model.frozen_norms:
        words.append(f"{model.frozen_norms} batch norms kept their statistics")
    if left_out := job.inputs.data.without_captions:
        words.append(f"{left_out} training pictures have no caption and were left out")
    if job.validation is None:
        words.append(
            "there is no validation split: nothing was compared, the last weights are kept"
        )
    if outcome.ended_early:
        words.append(f"stopped early after step {outcome.step} of {job.steps}")
    return words


log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_BATCH = {"heads": 1024}  # other recipes: 256
_CHUNK = {"cpu": 32, "mps": 64, "cuda": 256}
_PACKAGES = ("clipkit", "torch", "open_clip_torch", "timm", "transformers", "numpy")
_FEATURES = ".features/vectors-1.sqlite"  # beside the runs; the number changes with the schema


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    command: str = "",
) -> RunSummary:
    """Train as `config` says, in a new folder OUT/NAME, and export the best weights.

    `stop`, once set, ends the run after the step under way; `resume` goes on. `command` is what
    repeats the run, kept with it. InputError and its children for what cannot be trained.
    """
    device = distributed.own_device(towers.choose_device(config.device))
    with distributed.joined(device), own_generators(device):
        name = config.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = RunFolder(Path(config.out) / distributed.first(name))
        return _run(config, folder, device, on_progress, stop, command=command)


def resume(
    folder: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Go on with a run that was stopped or killed; on the CPU it ends with the same weights, bit
    for bit, as if it had not been. InputError if its model or data are not what they were."""
    run = RunFolder(folder)
    facts = run.facts()
    config = TrainConfig.from_mapping(facts["config"])
    device = distributed.own_device(towers.choose_device(config.device))
    with distributed.joined(device), own_generators(device):
        return _run(config, run, device, on_progress, stop, facts=facts)


def _run(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    on_progress: Callable[[Progress], None] | None,
    stop: threading.Event | None,
    *,
    command: str = "",
    facts: Mapping[str, Any] | None = None,
) -> RunSummary:
    tell = on_progress if on_progress and distributed.rank() == 0 else _quiet
    encoder = towers.load(config.start, device=str(device), precision="float32")
    loss = loss_of(encoder, config.loss)
    config.loss_options(loss)
    dtype = _DTYPES[_precision(device, config.precision)]
    model = TrainableTowers(encoder, loss=loss, compute=dtype, dropout=config.dropout)
    if config.activation_checkpointing:
        checkpoint_activations(encoder.model)
    data, held_out = _read(config)
    batch = config.batch or fitted_batch(len(data), most=_MOST_BATCH.get(config.recipe, 256))
    data.check_batch(batch)
    distributed.own_slice(batch)
    now = _facts(config, command, encoder, data, held_out, batch=batch, loss=loss)
    if facts is None:
        folder.check_new()
        distributed.collect(None)  # none creates it before all have looked
        if distributed.rank() == 0:
            folder.create(now)
    else:
        _check_unchanged(facts, now, folder)
        now = dict(facts)
    trainee: Towers = model
    if config.recipe == "heads":
        trainee = FrozenTowers(model, dropout=config.feature_dropout)
    trained = choose_parameters(trainee, config)
    asked = stop or threading.Event()
    try:
        inputs, validation = _inputs(config, model, trainee, data, held_out, tell, asked)
    except FeaturesStopped:
        return stopped_before_training(folder, config, model, trained)
    chunk = config.chunk or (batch if config.recipe == "heads" else _CHUNK[device.type])
    if config.drift < 0:
        plan = data.plans(epoch=0, batch=batch, seed=config.seed)[0]
        config = replace(config, drift=fitted_drift(trainee, inputs, plan, chunk=chunk))
    job = Job(
        config=config,
        loss=loss,
        batch=batch,
        chunk=chunk,
        half=dtype == torch.float16,
        towers=trainee,
        trained=trained,
        inputs=inputs,
        validation=validation,
        folder=folder,
        on_progress=tell,
        stop=asked,
    )
    log.info("training %d of %d parameters", trained.count, trained.total)
    outcome = fit(job, folder.load() if facts is not None else None)
    return finish(job, model, outcome, now)


def _quiet(_: Progress) -> None:
    """Nobody listens, or another process tells it."""


def _read(config: TrainConfig) -> tuple[CaptionedPictures, CaptionedPictures | None]:
    """The training split, and the validation split if there is one."""
    folder = Path(config.data)
    data = CaptionedPictures.read(folder, "train")
    if not has_split(folder, "validation"):
        return data, None
    return data, CaptionedPictures.read(folder, "validation", most=config.eval_pictures)


def _inputs(
    config: TrainConfig,
    model: TrainableTowers,
    trainee: Towers,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    tell: Callable[[Progress], None],
    stop: threading.Event,
) -> tuple[Inputs, Inputs | None]:
    """Return the training split, augmented, and the validation split if there is one."""
    training = PictureInputs(
        data,
        model,
        crop=1.0 if isinstance(trainee, FrozenTowers) else config.crop,
        flip=config.flip and not isinstance(trainee, FrozenTowers),
        seed=config.seed,
        workers=config.workers,
    )
    validation = PictureInputs(held_out, model, workers=config.workers) if held_out else None
    if not isinstance(trainee, FrozenTowers):
        return training, validation
    store = Path(config.out) / _FEATURES

    def on_batch(what: str, done: int, total: int) -> None:
        tell(Progress("features", done, total, words=what))

    return (
        trainee.features(training, store, on_batch, stop),
        trainee.features(validation, store, on_batch, stop) if validation else None,
    )


def _precision(device: torch.device, asked: str) -> str:
    """Of the arithmetic: half where the device is fast at it; float32 elsewhere."""
    if asked != "auto":
        if asked == "float16" and device.type == "cpu":
            raise InputError("precision float16 does not train on a CPU; use bfloat16 or float32")
        return asked
    return str(towers.choose_precision(device)) if device.type == "cuda" else "float32"


def _facts(
    config: TrainConfig,
    command: str,
    encoder: towers.DualEncoder,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    *,
    batch: int,
    loss: str,
) -> dict[str, Any]:
    """What config.json holds: all that decides the run."""
    return {
        "config": replace(config, data=str(Path(config.data).absolute())).to_json(),
        "batch": batch,
        "loss": loss,
        "encoder_id": encoder.encoder_id,
        "data": {
            "pictures": len(data),
            "fingerprint": data.fingerprint(),
            "validation_pictures": len(held_out) if held_out else 0,
            "validation_fingerprint": held_out.fingerprint() if held_out else None,
        },
        "processes": distributed.world_size(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "command": command,
        "created_at": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_unchanged(then: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """A resumed run must go on with what it began with."""
    for key, words in (
        ("encoder_id", "model"),
        ("data", "data"),
        ("batch", "batch"),
        ("processes", "number of processes"),
    ):
        if then.get(key) != now[key]:
            raise InputError(
                f"{folder.path} began with {words} {then.get(key)}, but now it is {now[key]}; "
                "restore it, or start a new run"
            )
