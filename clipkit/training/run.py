"""A training run, from its configuration to a checkpoint: `train`, and `resume` after a stop or kill."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkit import checkpoint, strength
from clipkit.errors import InputError
from clipkit.heap import freed_memory_kept
from clipkit.losses import LOSSES
from clipkit.towers import DTYPES, DualEncoder, choose_device, choose_precision, load
from clipkit.training import distributed
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures, Plan, fitted_batch, has_split
from clipkit.training.frozen_towers import FeaturesStopped, FrozenTowers
from clipkit.training.inputs import (
    Inputs,
    PictureInputs,
    UnreadablePicturesError,
    listed,
    readable_batch,
)
from clipkit.training.loop import Job, Progress, State, fit
from clipkit.training.memory import fitted_chunk
from clipkit.training.methods.method import Method, Setup
from clipkit.training.recipes import Trained, choose_parameters, merge_adapters
from clipkit.training.registry import METHODS
from clipkit.training.run_folder import FEATURES, RunFolder, write_json
from clipkit.training.towers import (
    Towers,
    TrainableTowers,
    check_batch_norms,
    checkpoint_activations,
    loss_of,
)
from clipkit.training.validation import Scores, embed_captions, embed_pictures
from clipkit.training.weights import ALPHAS, Mixture, choose_alpha, choose_drift

log = logging.getLogger(__name__)

_MOST_BATCH = {"heads": 1024}  # other recipes: 256
_PACKAGES = ("clipkit", "torch", "open_clip_torch", "timm", "transformers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The result of a run. Recalls are fractions by name, of the validation split, if there is one."""

    folder: Path
    recipe: str
    parent_id: str
    trained_parameters: int
    total_parameters: int
    stopped: bool = True  # by the user; the run can be resumed
    steps: int = 0
    best_step: int = 0  # 0: the start
    seconds: float = 0.0
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    alpha: float = 1.0  # weight of the trained model in the mixture with the start; 1 if not mixed
    drift: float = 0.0  # limit of a matrix's change, as a share of its size; 0: none
    checkpoint: Path | None = None  # an OpenCLIP folder; None if the run was stopped
    encoder_id: str | None = None
    notes: tuple[str, ...] = ()  # sentences for the user, warnings included


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    command: str = "",
) -> RunSummary:
    """Train as `config` says, in a new folder OUT/NAME, and export the best weights.

    stop: once set, the run ends after the current step; `resume` continues it.
    command: the command that repeats the run, stored with it.
    Raises InputError or one of its children for data, a model or options that cannot be trained.
    """
    with _processes(config) as device:
        name = config.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = RunFolder(Path(config.out) / distributed.collect(name)[0])
        return _train(config, folder, device, on_progress, stop, command=command)


def resume(
    folder: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Continue a run that was stopped or killed; on the CPU it ends with the same weights, bit for
    bit, as an uninterrupted one. Raises InputError if its model or data have changed."""
    run = RunFolder(folder)
    facts = run.facts()
    config = TrainConfig.from_mapping(facts["config"])
    with _processes(config) as device:
        return _train(config, run, device, on_progress, stop, earlier=facts)


@contextmanager
def _processes(config: TrainConfig) -> Iterator[torch.device]:
    """Connect the processes, keep the caller's random state, and yield this process's device."""
    device = distributed.own_device(choose_device(config.device))
    memory = freed_memory_kept() if device.type == "cpu" else nullcontext()
    with distributed.joined(device), distributed.own_generators(device), memory:
        yield device


def _train(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    on_progress: Callable[[Progress], None] | None,
    stop: threading.Event | None,
    *,
    command: str = "",
    earlier: Mapping[str, Any] | None = None,
) -> RunSummary:
    """Resolve every "auto", prepare the folder, towers and inputs, then fit and finish.

    earlier: the facts in config.json of a run to resume.
    """
    on_progress = on_progress if on_progress and distributed.rank() == 0 else lambda _: None
    stop = stop or threading.Event()
    encoder = load(config.start, device=str(device), precision="float32")
    entry = METHODS[config.method]
    loss = loss_of(encoder, config.loss, entry.losses)
    if loss:
        config.loss_options(loss)  # raises InputError for one that the loss does not have
    dtype = DTYPES[_precision(device, config.precision)]
    source, held_out = Path(config.data), None
    needs = config.needs()
    data = CaptionedPictures.read(source, "train", needs=needs)
    if has_split(source, "validation"):
        most = config.eval_pictures
        held_out = CaptionedPictures.read(source, "validation", most=most, needs=needs)
    batch = config.batch or fitted_batch(len(data), most=_MOST_BATCH.get(config.recipe, 256))
    data.check_batch(batch)
    distributed.own_slice(batch)  # raises InputError if the processes cannot share it
    check_batch_norms(encoder, config, batch // distributed.world_size())
    trainable = TrainableTowers(
        encoder,
        loss=loss,
        compute=dtype,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
    )
    if config.activation_checkpointing:
        checkpoint_activations(encoder.model)
    facts = _facts(config, command, encoder, data, held_out, batch=batch, loss=loss)
    if earlier is not None:
        _check_unchanged(earlier, facts, folder)
        facts = dict(earlier)
    else:
        folder.check_new()
    towers: Towers = trainable
    if config.recipe == "heads":
        towers = FrozenTowers(trainable, dropout=config.feature_dropout)
    method = make_method(config, loss, towers, data, batch, held_out)
    trained = choose_parameters(towers, config, method)
    if earlier is None:
        distributed.wait_for_all()  # every process has looked before one creates the folder
        if distributed.rank() == 0:
            folder.create(facts)
    summary = RunSummary(
        folder=folder.path,
        recipe=config.recipe,
        parent_id=encoder.encoder_id,
        trained_parameters=trained.count,
        total_parameters=trained.total,
    )

    def on_features(what: str, done: int, total: int) -> None:
        on_progress(Progress("features", done, total, message=what))

    try:
        inputs, validation = _inputs(
            config, folder, method, trainable, towers, data, held_out, on_features, stop
        )
        method.prepare(inputs, on_features, stop)
    except FeaturesStopped:
        note = "stopped before the first step; the features computed so far are kept"
        return replace(summary, notes=(note,))
    plan = data.plans(epoch=0, batch=batch, seed=config.seed, texts=method.text_views)[0]
    chunk = config.chunk or batch
    whole = config.recipe == "heads" or config.batch_norm == "batch"
    if not config.chunk and not whole:
        own_rows = batch // distributed.world_size()

        def try_rows(rows: int) -> None:
            _try_rows(rows, method, trained, inputs, plan)

        chunk = min(distributed.collect(fitted_chunk(device, own_rows, try_rows)))
    if config.drift < 0 and method.leaves_start:
        config = replace(config, drift=0.0)
    elif config.drift < 0:
        config = replace(config, drift=choose_drift(towers, inputs, plan, chunk=chunk))
    job = Job(
        config=config,
        method=method,
        batch=batch,
        chunk=chunk,
        half=dtype == torch.float16,
        towers=towers,
        trained=trained,
        inputs=inputs,
        validation=validation,
        folder=folder,
        on_progress=on_progress,
        stop=stop,
    )
    log.info("training %d of %d parameters", trained.count, trained.total)
    saved = folder.load() if earlier is not None else None
    if saved is not None:
        job = _without(job, saved["history"]["unreadable_validation"])
    try:
        state = fit(job, saved)
    except UnreadablePicturesError as error:
        if saved is not None or error.data is not held_out:
            raise
        job = _without(job, error.pictures)  # from the start: every evaluation is of the same
        state = fit(job)
    return _finish(job, state, summary, facts)


def make_method(
    config: TrainConfig,
    loss: str | None,
    towers: Towers,
    data: CaptionedPictures,
    batch: int,
    held_out: CaptionedPictures | None = None,
) -> Method:
    """Make a run's method, with every "auto" of the loss and the batch resolved."""
    return METHODS[config.method](
        Setup(
            config,
            LOSSES.get(loss or ""),
            config.method_options(),
            config.loss_options(loss) if loss else {},
            towers,
            data,
            batch,
            config.steps(len(data), batch),
            held_out,
        )
    )


def _precision(device: torch.device, precision: str) -> str:
    """Return the dtype of the arithmetic; "auto" is a half precision on CUDA, float32 elsewhere."""
    if precision == "auto":
        return str(choose_precision(device)) if device.type == "cuda" else "float32"
    if precision == "float16" and device.type == "cpu":
        raise InputError("precision float16 does not train on a CPU; use bfloat16 or float32")
    return precision


def _inputs(
    config: TrainConfig,
    folder: RunFolder,
    method: Method,
    trainable: TrainableTowers,
    towers: Towers,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    on_features: Callable[[str, int, int], None],
    stop: threading.Event,
) -> tuple[Inputs, Inputs | None]:
    """Return the training split, augmented, and the validation split if there is one; both as
    features if the towers are frozen."""
    frozen = towers if isinstance(towers, FrozenTowers) else None
    training = PictureInputs(
        data,
        trainable,
        augment=None if frozen else method.augment(),
        views=method.picture_views,
        seed=config.seed,
        workers=config.workers,
    )
    validation = PictureInputs(held_out, trainable, workers=config.workers) if held_out else None
    if frozen is None:
        return training, validation
    store = folder.path.parent / FEATURES
    return (
        frozen.features(training, store, on_features, stop),
        frozen.features(validation, store, on_features, stop) if validation else None,
    )


def _without(job: Job, pictures: Mapping[int, str]) -> Job:
    """Leave validation pictures out that cannot be read."""
    if not pictures or job.validation is None:
        return job
    return replace(job, validation=job.validation.without(pictures), unreadable=pictures)


def _try_rows(rows: int, method: Method, trained: Trained, inputs: Inputs, plan: Plan) -> None:
    """Pass the first rows of a batch through the towers, and back through those that are trained."""
    views = method.views(readable_batch(inputs, plan))
    method.setup.towers.mode(True)
    for view in views:
        with torch.set_grad_enabled(view.side in trained.sides):
            made = view.encode(view.rows[torch.arange(rows)])
        if made.requires_grad:
            made.sum().backward()  # type: ignore[no-untyped-call]
    for parameter in trained.named.values():
        parameter.grad = None


# ---- what identifies a run


def _facts(
    config: TrainConfig,
    command: str,
    encoder: DualEncoder,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    *,
    batch: int,
    loss: str | None,
) -> dict[str, Any]:
    """Return the content of config.json: all that decides the run."""
    return {
        "config": replace(
            config,  # a run can be resumed from any working folder
            data=str(Path(config.data).absolute()),
            out=str(Path(config.out).absolute()),
            start=checkpoint.absolute(config.start),
            options={**config.options, **getattr(config.method_options(), "absolute", {})},
        ).to_mapping(),
        "batch": batch,
        "steps": config.steps(len(data), batch),
        "captions": len(data.captions),
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
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_unchanged(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise InputError if the model, data, batch or number of processes differ from the run's start."""
    names = {"encoder_id": "model", "processes": "number of processes"}
    for key in ("encoder_id", "data", "batch", "processes"):
        if earlier.get(key) != now[key]:
            raise InputError(
                f"{folder.path} began with {names.get(key, key)} {earlier.get(key)}, but now it is "
                f"{now[key]}; restore it, or start a new run"
            )


# ---- from the best weights to a checkpoint


def _finish(job: Job, state: State, summary: RunSummary, facts: Mapping[str, Any]) -> RunSummary:
    """Complete the summary; unless the run was stopped, merge, mix with the start, and export."""
    history = state.history
    summary = replace(
        summary,
        stopped=history.stopped,
        steps=history.step,
        best_step=history.best_step or history.step,
        seconds=history.seconds,
        drift=job.config.drift,
        before=history.start.metrics if history.start else None,
        after=history.best.metrics if history.best else None,
        notes=(*_notes(job, state), *history.warnings),
    )
    if history.stopped:
        return summary
    best_weights = history.best_weights
    if not best_weights:  # no validation split: the last weights, or their running mean
        with state.ema.applied():
            best_weights = job.trained.copy()
    job.trained.load_state_dict(best_weights)
    job.towers.mode(False)
    merge_adapters(job.towers.model)
    mixture = Mixture(1.0, {})
    validation, at_start = job.validation, history.start
    if validation is not None and at_start is not None and job.config.keep == "best":
        mixture = _mix(job, validation, at_start)
        summary = replace(summary, alpha=mixture.alpha, after=mixture.scores[mixture.alpha].metrics)
        if mixture.alpha == 0:
            note = (
                "no trained weights were better than the starting model on the validation split, "
            )
            note += "so it is unchanged"
            summary = replace(summary, best_step=0, notes=(*summary.notes, note))
    if mixture.alpha:
        job.towers.encoder.untrained -= job.trained.sides
    job.on_progress(Progress("saving", history.step, job.steps))
    folder, result = job.folder, job.folder.checkpoint
    if distributed.rank() == 0:
        job.towers.encoder.save(result, provenance=_provenance(job.config, summary, facts))
    distributed.wait_for_all()  # for the checkpoint
    identity = checkpoint.identify(str(result))
    assert identity is not None
    summary = replace(summary, checkpoint=result, encoder_id=identity.encoder_id)
    if identity.space_id == job.towers.encoder.space_id:
        note = "the picture side is that of the starting model, so an index needs no new vectors"
        summary = replace(summary, notes=(*summary.notes, note))
    calibration = _calibration(job, identity.encoder_id, summary.parent_id)
    if distributed.rank() == 0:
        if calibration is not None:
            calibration.write(result)
        content = json.loads(json.dumps(asdict(summary), default=str))
        content["mixture"] = {
            str(alpha): {"loss": s.loss, **s.metrics} for alpha, s in mixture.scores.items()
        }
        write_json(folder.summary, content)
    return summary


def _calibration(job: Job, encoder_id: str, parent_id: str) -> strength.Calibration | None:
    """Fit the calibration of strengths on the validation split; its dependence on the library's size is
    taken from the starting model. With too few captions, or unchanged weights, return the starting
    model's, None if it has none. All processes must call it."""
    start = strength.read(job.config.start, parent_id)
    validation = job.validation
    captioned = validation is not None and min(map(len, validation.data.owned)) > 0
    encodes_texts = "text" not in job.towers.encoder.untrained
    if validation is not None and captioned and encodes_texts and encoder_id != parent_id:
        pictures = embed_pictures(job.towers, validation)
        captions = embed_captions(job.towers, validation)[validation.data.captions]
        owner = np.asarray(validation.data.owner)
        fitted = strength.fit_captions(
            pictures,
            captions,
            owner,
            encoder_id=encoder_id,
            size=strength.USUAL_SIZE if start is None else start.size,
        )
        if fitted is not None:
            return fitted
    if start is None:
        return None
    inherited = {**start.fitted_on, "inherited_from": job.config.start}
    return replace(start, encoder_id=encoder_id, fitted_on=inherited)


def _notes(job: Job, state: State) -> list[str]:
    """Return sentences about the training for the user."""
    notes = []
    if left_out := job.inputs.data.left_out:
        what = " and ".join(need.removesuffix("s") for need in sorted(job.config.needs()))
        notes.append(f"{left_out} training pictures without a {what} were left out")
    if job.validation is None:
        notes.append(
            "the dataset has no validation split, so the last weights were kept without a comparison"
        )
    history = state.history
    for split, pictures in (
        ("training", history.unreadable),
        ("validation", history.unreadable_validation),
    ):
        if pictures:
            notes.append(f"{len(pictures)} {split} pictures were left out: {listed(pictures)}")
    if not history.stopped and history.step < job.steps:
        notes.append(
            f"stopped early after step {history.step} of {job.steps}: validation did not improve"
        )
    return notes


def _mix(job: Job, validation: Inputs, at_start: Scores) -> Mixture:
    """Mix the trained weights with the start as the validation split suggests."""
    model = job.towers.model
    start = load(job.config.start, device="cpu", precision="float32").model.state_dict()
    trained = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not torch.equal(value.cpu(), start[name])
    }
    random = job.towers.encoder.untrained & job.trained.sides  # nothing to keep of such a start
    alphas = ALPHAS if job.config.interpolate and not random else (1.0,)

    def scores() -> Scores:
        job.on_progress(Progress("mixing", 0, len(alphas)))
        return job.method.evaluate(validation)

    return choose_alpha(model, start, trained, scores, at_start=at_start, alphas=alphas)


def _provenance(
    config: TrainConfig, summary: RunSummary, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the checkpoint's clipkit.json says of how it was made."""
    return {
        "parent": {"spec": config.start, "encoder_id": summary.parent_id},
        "recipe": config.recipe,
        "data": facts["data"],
        "metrics": {"validation_before": summary.before, "validation": summary.after},
        "alpha": summary.alpha,
        "steps": summary.steps,
        "best_step": summary.best_step,
        "seconds": round(summary.seconds, 1),
        "versions": facts["versions"],
        "command": facts["command"],
    }
