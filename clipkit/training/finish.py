"""From the best weights to a checkpoint: merge, mix with the start, export, write down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from clipkit import checkpoint, towers
from clipkit.training import distributed
from clipkit.training.adapters import merge_adapters
from clipkit.training.checkpoint import RunFolder, write_json
from clipkit.training.config import TrainConfig
from clipkit.training.evaluation import Scores, evaluate
from clipkit.training.interpolate import ALPHAS, Mixture, choose_alpha
from clipkit.training.job import Job, Outcome, Progress
from clipkit.training.model import TrainableTowers
from clipkit.training.parameters import Trained

__all__ = ["RunSummary", "finish", "stopped_before_training"]


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
