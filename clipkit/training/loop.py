"""The training loop.

    evaluate the start
    for each epoch: plan its batches
        for each batch: embed, loss, gradients, clip, step, L2-SP, the method's own, EMA, metrics
            periodically: evaluate, keep the best weights, save a state, stop early

All randomness comes from the seed, the epoch and the saved random states, so a run that was killed
and resumed from its last state ends with the same weights, on the CPU bit for bit.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from clipkit.errors import InputError
from clipkit.training import distributed
from clipkit.training.config import TrainConfig
from clipkit.training.data import Plan, replaced
from clipkit.training.gradient_cache import ChunkedTower, backward
from clipkit.training.inputs import (
    MOST_UNREADABLE,
    Batch,
    Inputs,
    Unreadable,
    UnreadablePicturesError,
)
from clipkit.training.memory import explained_out_of_memory
from clipkit.training.methods.method import Method
from clipkit.training.recipes import Trained, adapter_sizes, make_optimizer, rate_factor
from clipkit.training.run_folder import RunFolder, Tracker
from clipkit.training.towers import Towers
from clipkit.training.validation import Scores
from clipkit.training.weights import L2SP, Ema

_LISTED = 8  # pictures that an error lists


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, for its user."""

    phase: Literal["features", "training", "evaluating", "mixing", "saving"]
    done: int
    total: int  # 0: unknown
    loss: float | None = None
    evaluated: int | None = None  # the step of the last evaluation; 0: the start
    validation_loss: float | None = None  # of that evaluation
    score: float | None = None  # of that evaluation: the mean of the method's metrics
    score_title: str = ""  # such as "mean recall"
    best_step: int = 0  # of the best evaluation after the start; 0: none yet, or the last counts
    eta_seconds: float | None = None  # of the training, should it not stop early
    message: str = ""  # what features are computed of, or a warning, shown once


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What `fit` needs, with every "auto" resolved."""

    config: TrainConfig
    method: Method
    batch: int
    chunk: int
    half: bool  # float16: scale the loss, so that small gradients do not vanish
    towers: Towers
    trained: Trained
    inputs: Inputs
    validation: Inputs | None
    folder: RunFolder
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    unreadable: Mapping[int, str] = field(default_factory=dict)  # pictures not in `validation`

    @property
    def steps_per_epoch(self) -> int:
        return len(self.inputs.data) // self.batch

    @property
    def steps(self) -> int:
        return self.config.steps(len(self.inputs.data), self.batch)


@dataclass(slots=True, eq=False)
class History:
    """How far a run has come, and its evaluations."""

    step: int = 0  # steps done; the sampler's position, since the seed and it give the next pairs
    seconds: float = 0.0  # of training
    stopped: bool = False  # by the user; the run can be resumed
    start: Scores | None = None
    last: Scores | None = None
    best: Scores | None = None  # of the trained weights
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    without_gain: int = 0  # evaluations since the best one
    # names and reasons of pictures that are left out, by number
    unreadable: dict[int, str] = field(default_factory=dict)
    unreadable_validation: dict[int, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {n: asdict(v) if isinstance(v, Scores) else v for n, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            scores = name in ("start", "last", "best") and value is not None
            setattr(self, name, Scores(**value) if scores else value)


class State:
    """Everything that changes during a run. Each attribute saves and restores itself."""

    def __init__(self, job: Job) -> None:
        self.parameters = job.trained
        self.method = job.method
        self.optimizer = make_optimizer(job.trained, job.config)
        self.scaler = torch.amp.GradScaler(job.towers.device.type, enabled=job.half)
        self.ema = Ema(job.trained.averaged, job.config.ema)
        self.random = distributed.RandomStates(job.towers.device)
        self.history = History()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors. Every process must call this."""
        return {name: holder.state_dict() for name, holder in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, holder in vars(self).items():
            holder.load_state_dict(state[name])


def fit(job: Job, saved: Mapping[str, Any] | None = None) -> State:
    """Train until the steps are done, validation stops improving, or `job.stop` is set.

    A picture that cannot be read is left out, and named in the history.

    saved: the state from `RunFolder.load`, to resume from. Torch's default generators, which dropout
    uses, are seeded; see `distributed.own_generators`. The parameters hold the weights of the last
    step. Raises InputError for a loss or gradient that is not finite, with the step and the pictures;
    UnreadablePicturesError if validation pictures, or too many training pictures, cannot be read.
    """
    run = _Run(job)
    run.resume(saved) if saved else run.begin()
    run.ready = time.monotonic()
    while not run.is_over:
        with closing(job.inputs.stream(run.remaining_plans())) as batches:
            for batch in batches:
                if run.leaves_out(batch):
                    break  # and plan again
                assert isinstance(batch, Batch)
                run.train_step(batch)
                run.after_step()
                if run.is_over:
                    break
    run.save()
    run.tracker.close()
    return run.state


class _Run:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = State(job)
        self.history = self.state.history
        self.tracker = Tracker(job.folder, job.config)
        # Made now, while the weights are those of the start.
        sizes = {id(job.trained.named[name]): 0.0 for name in job.trained.own}
        sizes |= adapter_sizes(job.towers.model)
        self.l2sp = L2SP(self.state.optimizer, job.config.drift, sizes)
        self.started, self.earlier_seconds = time.monotonic(), 0.0
        self.ready = self.started  # when what came before the next step was done
        self.first_step = 0  # of this process
        self.evaluations, self.evaluation_seconds = 0, 0.0  # of this process
        self.evaluated: int | None = None

    # ---- start and end

    def begin(self) -> None:
        # Each process drops other values.
        torch.manual_seed(self.job.config.seed + 7919 * distributed.rank())
        self.history.unreadable_validation |= self.job.unreadable
        if self.job.validation is not None:
            self.evaluate(self.job.validation)

    def resume(self, saved: Mapping[str, Any]) -> None:
        self.state.load_state_dict(saved)
        self.history.stopped = False
        self.first_step, self.earlier_seconds = self.history.step, self.history.seconds
        if distributed.rank() == 0:
            self.job.folder.drop_metrics_after(self.history.step)

    @property
    def is_over(self) -> bool:
        patience, history = self.job.config.patience, self.history
        impatient = bool(patience) and history.without_gain >= patience
        return history.stopped or impatient or history.step >= self.job.steps

    def save(self) -> None:
        self.history.seconds = self.seconds
        state = self.state.state_dict()
        if distributed.rank() == 0:
            self.job.folder.save(self.history.step, state)

    # ---- one step

    def remaining_plans(self) -> Iterable[Plan]:
        """Plan the rest of the epoch."""
        job = self.job
        epoch, position = divmod(self.history.step, job.steps_per_epoch)
        plans = job.method.plans(
            job.inputs, epoch=epoch, batch=job.batch, searching=lambda: self.report("evaluating")
        )
        assert len(plans) == job.steps_per_epoch, (
            f"{type(job.method).__name__} planned {len(plans)}"
        )
        plans = replaced(plans, self.history.unreadable, job.inputs.data)
        return plans[position : position + job.steps - self.history.step]

    def leaves_out(self, batch: Batch | Unreadable) -> bool:
        """Note pictures that could not be read, here or in another process; return whether there are
        any, so that the step must be planned without them."""
        job, history = self.job, self.history
        found = batch.pictures if isinstance(batch, Unreadable) else {}
        new = {p: why for part in distributed.collect(found) for p, why in part.items()}
        if not new:
            return False
        history.unreadable |= new
        if len(history.unreadable) > MOST_UNREADABLE * len(job.inputs.data):
            raise UnreadablePicturesError(job.inputs.data, history.unreadable)
        for why in new.values():
            self.report("training", f"left out: {why}")
        return True

    def train_step(self, batch: Batch) -> None:
        """Embed, compute the loss and gradients, clip, step, pull, average."""
        job, config, state = self.job, self.job.config, self.state
        factor = rate_factor(self.history.step, job.steps, config.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        job.towers.mode(True)
        state.optimizer.zero_grad()
        with explained_out_of_memory(job.chunk):
            loss, rows = backward(
                [
                    ChunkedTower(
                        view.encode,
                        view.rows,
                        chunk=job.chunk,
                        trained=view.side in job.trained.sides,
                        order=view.order,
                        device=job.towers.device,
                    )
                    for view in job.method.views(batch)
                ],
                lambda rows: job.method.loss(rows, batch),
                gather=distributed.gather,
                scale=state.scaler.scale,
                check=lambda rows, value: self.check_finite(rows, value, batch.plan),
            )
        trained = job.trained
        distributed.sum_gradients(trained.towers.values(), list(trained.shared.values()))
        state.scaler.unscale_(state.optimizer)
        limit = config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(trained.named.values()), limit)
        if not torch.isfinite(norm) and not job.half:  # float16's scaler skips such a step itself
            raise self.not_finite("gradient", batch.plan, range(len(batch.plan.pictures)))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        self.l2sp.pull()
        self.history.step += 1
        job.method.after_step(rows, self.history.step)
        state.ema.update(self.history.step)
        metrics = {
            "loss": loss.item(),
            "learning_rate": config.learning_rate * factor,
            "gradient_norm": norm.item(),
            **job.method.metrics(),
            "pictures_per_second": job.batch / max(time.monotonic() - self.ready, 1e-9),
            "seconds": self.seconds,
        }
        self.tracker.write(self.history.step, metrics)
        self.report("training", loss=metrics["loss"])

    def check_finite(self, rows: Sequence[torch.Tensor], loss: torch.Tensor, plan: Plan) -> None:
        if not torch.isfinite(loss):
            finite = torch.stack([torch.isfinite(column).all(1) for column in rows]).all(0)
            broken = torch.nonzero(~finite).flatten().tolist() or range(len(finite))
            raise self.not_finite("loss", plan, broken)

    def not_finite(self, what: str, plan: Plan, rows: list[int] | range) -> InputError:
        names = self.job.inputs.data.names(plan.pictures[list(rows)])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return InputError(
            f"the {what} at step {self.history.step + 1} is not finite; "
            f"pictures: {', '.join(names[:_LISTED])}{more}; "
            "check them, lower learning_rate, or use precision float32"
        )

    # ---- between steps

    def after_step(self) -> None:
        """Evaluate, stop and save when it is time."""
        job, step = self.job, self.history.step
        every = self.eval_every
        if job.validation is not None and (step % every == 0 or step == job.steps):
            self.evaluate(job.validation)
        # Any process's stop ends the run in all of them, after the same step.
        if any(distributed.collect(job.stop.is_set())):
            self.history.stopped = True
        if step % (job.config.checkpoint_every or every) == 0 and not self.is_over:
            self.save()
        self.ready = time.monotonic()  # waiting for the next batch counts as its time

    def evaluate(self, validation: Inputs) -> None:
        """Evaluate the mean of the weights, and keep it if it is the best so far.

        `run` later decides whether to mix it with the start.
        """
        history, began = self.history, time.monotonic()
        self.report("evaluating")
        with self.state.ema.applied():
            scores = history.last = self.job.method.evaluate(validation)
            keep_last = self.job.config.keep == "last"
            if history.step == 0:
                history.start = scores
            elif history.best is None or keep_last or scores.beats(history.best):
                history.best, history.best_step, history.without_gain = scores, history.step, 0
                history.best_weights = self.job.trained.copy()
            else:
                history.without_gain += 1
        metrics = {**scores.metrics, "validation_loss": scores.loss, **scores.space}
        self.tracker.write(history.step, metrics, spectrum=scores.spectrum)
        warning = scores.collapse_warning(history.start) or self.job.method.warning()
        if warning and not history.warnings:
            history.warnings.append(f"at step {history.step} {warning}")
            self.report("evaluating", history.warnings[0])
        self.evaluations += 1
        self.evaluation_seconds += time.monotonic() - began
        self.evaluated = history.step
        self.report("evaluating")

    @property
    def eval_every(self) -> int:
        return self.job.config.eval_every or self.job.steps_per_epoch

    @property
    def eta_seconds(self) -> float | None:
        """Return the time for the steps and evaluations that are left; None before the first step."""
        step, steps = self.history.step, self.job.steps
        if step == self.first_step:
            return None
        training = time.monotonic() - self.started - self.evaluation_seconds
        left = steps // self.eval_every - step // self.eval_every + bool(steps % self.eval_every)
        evaluation = self.evaluation_seconds / max(self.evaluations, 1)
        return training / (step - self.first_step) * (steps - step) + evaluation * left

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def report(
        self,
        phase: Literal["training", "evaluating"],
        message: str = "",
        *,
        loss: float | None = None,
    ) -> None:
        last = self.history.last
        self.job.on_progress(
            Progress(
                phase,
                self.history.step,
                self.job.steps,
                loss=loss,
                evaluated=self.evaluated,
                validation_loss=last.loss if last else None,
                score=last.mean if last else None,
                score_title=last.title if last else "",
                best_step=self.history.best_step if self.job.config.keep == "best" else 0,
                eta_seconds=self.eta_seconds,
                message=message,
            )
        )
