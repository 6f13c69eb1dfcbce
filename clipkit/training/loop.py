"""The training loop, to be read from top to bottom.

    evaluate the start
    for each epoch: plan its batches (with hard negatives, if asked)
        for each batch: embed, loss, gradients, clip, step, leash, clamp, mean of weights, metrics
            now and then: evaluate, keep the best, save a state, stop early

Everything that is random comes from the seed, the epoch and the saved random state, so a run that
was killed and goes on from its last state ends with the very same weights.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from clipkit.errors import InputError
from clipkit.losses import LOSSES
from clipkit.training import distributed
from clipkit.training.config import TrainConfig
from clipkit.training.data import Plan, mine
from clipkit.training.distributed import random_state, set_random_state
from clipkit.training.gradient_cache import ChunkedTower, backward, refuse_batch_norms
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.recipes import Trained, adapter_sizes, make_optimizer, rate_factor
from clipkit.training.run_folder import RunFolder, State, Tracker
from clipkit.training.towers import Towers
from clipkit.training.validation import Scores, embed, evaluate
from clipkit.training.weights import Ema, Leash


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run tells while it goes on."""

    phase: Literal["features", "training", "evaluating", "mixing", "saving"]
    done: int
    total: int  # 0: unknown
    loss: float | None = None
    mean_recall: float | None = None  # of the last evaluation
    best_recall: float | None = None
    pictures_per_second: float | None = None
    eta_seconds: float | None = None
    words: str = ""  # a warning, said once


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What `fit` needs, with everything "auto" decided."""

    config: TrainConfig
    loss: str
    batch: int
    chunk: int
    half: bool  # float16: the loss is scaled so that small gradients do not vanish
    towers: Towers
    trained: Trained
    inputs: Inputs
    validation: Inputs | None
    folder: RunFolder
    on_progress: Callable[[Progress], None]
    stop: threading.Event

    @property
    def steps_per_epoch(self) -> int:
        return len(self.inputs.data) // self.batch

    @property
    def steps(self) -> int:
        most = self.config.epochs * self.steps_per_epoch
        return min(most, self.config.max_steps) if self.config.max_steps else most


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Where training ended. The parameters hold the last step's weights; `best` the best ones'."""

    step: int
    stopped: bool  # asked to; a state to go on from is saved
    ended_early: bool  # validation got no better
    best: Mapping[str, torch.Tensor]
    best_step: int
    start_scores: Scores | None
    best_scores: Scores | None
    seconds: float
    warnings: tuple[str, ...]


log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**23  # of scores at a time, in the loss: a dozen arrays of this size exist
_NAMED = 8  # pictures that an error names


def fit(job: Job, saved: tuple[State, dict[str, torch.Tensor]] | None = None) -> Outcome:
    """Train until the steps are done, validation gets no better, or `job.stop` is set.

    saved: what `RunFolder.load` gave, to go on from. Torch's default generators, which dropout draws
    from, are seeded: callers keep their own (see `randomness.own_generators`). InputError for a
    loss that is not finite, with the step and the pictures.
    """
    job.inputs.data.check_batch(job.batch)
    run = _Run(job)
    run.restore(*saved) if saved else run.begin()
    while run.step < job.steps and not run.over:
        epoch, position = divmod(run.step, job.steps_per_epoch)
        if position == 0:
            run.refresh_negatives(epoch)
        plans = job.inputs.data.plans(
            epoch=epoch, batch=job.batch, seed=job.config.seed, alike=run.alike_rows
        )
        remaining = plans[position : position + job.steps - run.step]
        with closing(job.inputs.stream(remaining)) as batches:
            for batch in batches:
                run.train_step(batch)
                run.look_after()
                if run.over:
                    break
    run.save()
    return run.outcome()


@dataclass(eq=False)
class _Run:
    job: Job
    step: int = 0
    over: bool = False
    stopped: bool = False
    waited: int = 0
    alike: torch.Tensor | None = None
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int = 0
    start_scores: Scores | None = None
    best_scores: Scores | None = None
    last_scores: Scores | None = None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        job = self.job
        self.optimizer = make_optimizer(job.trained, job.config)
        self.scaler = torch.amp.GradScaler(job.towers.device.type, enabled=job.half)
        # Now, while the weights are the start's.
        self.leash = Leash(self.optimizer, job.config.drift, adapter_sizes(job.towers.model))
        self.ema = Ema(job.trained.named, job.config.ema)
        self.tracker = Tracker(job.folder, job.config)
        kind = LOSSES[job.loss]
        scale, bias = job.towers.logit_scale, job.towers.logit_bias
        self.scalars = [scale, bias] if kind.has_bias and bias is not None else [scale]
        # CLIP, section 2.5: the scale stays within [1, 100]. A checkpoint that starts above keeps
        # its own limit, or the first step would change the model. SigLIP's has no limit.
        self.highest = max(math.log(100.0), float(scale.detach().max()))
        self.clamps = kind.clamps_scale
        self.options = job.config.loss_options(job.loss)
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.first_step = 0  # of this process

    # ---- before the first step

    def begin(self) -> None:
        # Each process drops other values.
        torch.manual_seed(self.job.config.seed + 7919 * distributed.rank())
        if self.job.validation is not None:
            self.evaluate()

    def restore(self, state: State, best: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.job.trained.named.items():
                parameter.copy_(state.parameters[name])
        self.optimizer.load_state_dict(state.optimizer)
        self.scaler.load_state_dict(state.scaler)
        self.ema.restore(state.ema)
        self.step = self.first_step = state.step
        self.alike, self.waited, self.seconds_before = state.alike, state.waited, state.seconds
        self.best, self.best_step = best, state.best_step
        self.start_scores = Scores(**state.start_scores) if state.start_scores else None
        self.best_scores = Scores(**state.best_scores) if state.best_scores else None
        self.last_scores = self.best_scores
        set_random_state(state.random[distributed.rank()])
        if distributed.rank() == 0:
            self.job.folder.forget_after(state.step)
        patience = self.job.config.patience
        self.over = bool(patience and self.waited >= patience)

    # ---- one step

    def train_step(self, batch: Batch) -> None:
        """Embed, loss, gradients, clip, step, leash, clamp."""
        job, config = self.job, self.job.config
        began = time.monotonic()
        factor = rate_factor(self.step, job.steps, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        job.towers.mode(True)
        refuse_batch_norms(job.towers.model)
        self.optimizer.zero_grad(set_to_none=True)
        images = ChunkedTower(
            job.towers.images,
            batch.images,
            chunk=job.chunk,
            trained=job.trained.image,
            device=job.towers.device,
        )
        texts = ChunkedTower(
            job.towers.texts,
            batch.texts,
            chunk=job.chunk,
            trained=job.trained.text,
            order=batch.text_order,
            device=job.towers.device,
        )
        loss = backward(
            images,
            texts,
            lambda i, t: self.loss(i, t, batch.plan),
            gather=distributed.gather,
            scale=self.scaler.scale,
            check=lambda i, t, value: self.refuse_nan(i, t, value, batch.plan),
        )
        distributed.sum_gradients(job.trained.towers.values(), self.scalars)
        self.scaler.unscale_(self.optimizer)
        longest = config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(job.trained.named.values()), longest)
        if not torch.isfinite(norm) and not job.half:  # float16's scaler skips such a step itself
            raise InputError(
                self.nan_words("gradient", batch.plan, range(len(batch.plan.pictures)))
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.leash.pull()
        if self.clamps:
            with torch.no_grad():
                job.towers.logit_scale.clamp_(0.0, self.highest)
        self.step += 1
        self.ema.update(self.step)
        self.tell(loss.item(), norm.item(), factor, time.monotonic() - began)

    def loss(self, images: torch.Tensor, texts: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Over all processes' pairs."""
        same = self.job.inputs.data.same(plan)
        rows = max(1, _BLOCK_BYTES // (4 * len(images)))
        return LOSSES[self.job.loss].function(
            images,
            texts,
            *self.scalars,
            same=None if same is None else same.to(images.device),
            duplicates=self.job.config.duplicates,
            block_rows=rows,
            **self.options,
        )

    def refuse_nan(
        self, images: torch.Tensor, texts: torch.Tensor, loss: torch.Tensor, plan: Plan
    ) -> None:
        if torch.isfinite(loss):
            return
        bad = ~(torch.isfinite(images).all(1) & torch.isfinite(texts).all(1))
        rows = torch.nonzero(bad).flatten().tolist() or range(len(images))
        raise InputError(self.nan_words("loss", plan, rows))

    def nan_words(self, what: str, plan: Plan, rows: list[int] | range) -> str:
        names = self.job.inputs.data.names(plan.pictures[list(rows)])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return (
            f"the {what} at step {self.step + 1} is not finite; "
            f"pictures: {', '.join(names[:_NAMED])}{more}; "
            "look at them, lower learning_rate, or use precision float32"
        )

    # ---- between steps

    def look_after(self) -> None:
        """Evaluate, stop early and save when it is time."""
        job, config = self.job, self.job.config
        every = config.eval_every or job.steps_per_epoch
        if job.validation is not None and (self.step % every == 0 or self.step == job.steps):
            self.evaluate()
            if config.patience and self.waited >= config.patience:
                self.over = True
        if distributed.any_true(job.stop.is_set()):
            self.over = self.stopped = True
        if self.step % (config.checkpoint_every or every) == 0 and not self.over:
            self.save()

    def evaluate(self) -> None:
        """Recall, loss and the space's shape with the mean of the weights. The best of the tuned is
        kept; whether any share of it is better than the start is asked at the end."""
        assert self.job.validation is not None
        self.say("evaluating")
        with self.ema.applied():
            scores = evaluate(self.job.towers, self.job.validation)
            self.last_scores = scores
            if self.step == 0:
                self.start_scores = scores
            elif self.best_scores is None or scores.beats(self.best_scores):
                self.best_scores, self.best_step, self.waited = scores, self.step, 0
                self.best = {n: p.detach().cpu().clone() for n, p in self.job.trained.named.items()}
            else:
                self.waited += 1
        measured = {**scores.recall, "validation_loss": scores.loss, **scores.space}
        self.tracker.write(self.step, measured)
        if (words := scores.worry(self.start_scores)) and not self.warnings:
            self.warnings.append(f"at step {self.step} {words}")
            log.warning(self.warnings[0])
            self.say("evaluating", self.warnings[0])

    def refresh_negatives(self, epoch: int) -> None:
        config = self.job.config
        if config.hard_negatives and epoch % config.hard_negatives_every == 0:
            self.say("evaluating")
            pictures, texts = embed(self.job.towers, self.job.inputs)
            mined = mine(
                pictures,
                texts,
                self.job.inputs.data,
                count=config.hard_negatives,
                margin=config.hard_negatives_margin,
            )
            self.alike = torch.from_numpy(mined)

    @property
    def alike_rows(self) -> Any:
        return None if self.alike is None else self.alike.numpy()

    def save(self) -> None:
        state = State(
            step=self.step,
            parameters={n: p.detach() for n, p in self.job.trained.named.items()},
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            ema=self.ema.state(),
            random=distributed.collect(random_state(self.job.towers.device)),
            alike=self.alike,
            best_step=self.best_step,
            waited=self.waited,
            start_scores=asdict(self.start_scores) if self.start_scores else {},
            best_scores=asdict(self.best_scores) if self.best_scores else {},
            seconds=self.seconds,
        )
        if distributed.rank() == 0:
            self.job.folder.save(state, self.best)

    def outcome(self) -> Outcome:
        best = self.best
        if not best:  # nothing to judge by: the last weights, as their mean if there is one
            with self.ema.applied():
                best = {n: p.detach().cpu().clone() for n, p in self.job.trained.named.items()}
        self.tracker.close()
        return Outcome(
            step=self.step,
            stopped=self.stopped,
            ended_early=self.over and not self.stopped and self.step < self.job.steps,
            best=best,
            best_step=self.best_step if self.best else self.step,
            start_scores=self.start_scores,
            best_scores=self.best_scores,
            seconds=self.seconds,
            warnings=tuple(self.warnings),
        )

    # ---- what is told

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def tell(self, loss: float, norm: float, factor: float, seconds: float) -> None:
        line = {
            "loss": loss,
            "learning_rate": self.job.config.learning_rate * factor,
            "gradient_norm": norm,
            "logit_scale": float(self.job.towers.logit_scale.detach().exp().mean()),
            "pictures_per_second": self.job.batch / max(seconds, 1e-9),
            "seconds": self.seconds,
        }
        self.tracker.write(self.step, line)
        self.say("training", loss=loss)

    def say(
        self,
        phase: Literal["training", "evaluating"],
        words: str = "",
        *,
        loss: float | None = None,
    ) -> None:
        done = self.step - self.first_step
        passed = time.monotonic() - self.started
        known = (self.start_scores, self.best_scores)
        left = passed / done * (self.job.steps - self.step) if done else None
        self.job.on_progress(
            Progress(
                phase,
                self.step,
                self.job.steps,
                loss=loss,
                mean_recall=self.last_scores.mean_recall if self.last_scores else None,
                best_recall=max((s.mean_recall for s in known if s), default=None),
                pictures_per_second=done * self.job.batch / passed if done else None,
                eta_seconds=left,
                words=words,
            )
        )
