"""A training run from its configuration to a checkpoint: `train`, and `resume` after a kill."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from clipkit import towers
from clipkit.errors import InputError
from clipkit.records import METADATA
from clipkit.training import distributed
from clipkit.training.checkpoint import RunFolder
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures, fitted_batch
from clipkit.training.finish import RunSummary, finish, stopped_before_training
from clipkit.training.heads import FeaturesStopped, FrozenTowers
from clipkit.training.inputs import Inputs, PictureInputs
from clipkit.training.job import Job, Progress
from clipkit.training.leash import fitted_drift
from clipkit.training.loop import fit
from clipkit.training.model import Towers, TrainableTowers, checkpoint_activations, loss_of
from clipkit.training.parameters import choose_parameters
from clipkit.training.randomness import own_generators

__all__ = ["RunSummary", "resume", "train"]

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_BATCH = {"heads": 1024}  # other recipes: 256
_CHUNK = {"cpu": 32, "mps": 64, "cuda": 256}
_PACKAGES = ("clipkit", "torch", "open_clip_torch", "timm", "transformers", "numpy")
_FEATURES = ".features"  # beside the runs: frozen features, by encoder and data


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
    if not (folder / "validation" / METADATA).is_file():
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
    """The training split, augmented, and the validation split if there is one."""
    inputs: Inputs = PictureInputs(
        data,
        model,
        crop=1.0 if isinstance(trainee, FrozenTowers) else config.crop,
        flip=config.flip and not isinstance(trainee, FrozenTowers),
        seed=config.seed,
        workers=config.workers,
    )
    validation: Inputs | None = None
    if held_out is not None:
        validation = PictureInputs(held_out, model, workers=config.workers)
    if isinstance(trainee, FrozenTowers):
        cache = Path(config.out) / _FEATURES

        def told(what: str, done: int, total: int) -> None:
            tell(Progress("features", done, total, words=what))

        inputs = trainee.features(inputs, cache, told, stop)
        validation = trainee.features(validation, cache, told, stop) if validation else None
    return inputs, validation


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
