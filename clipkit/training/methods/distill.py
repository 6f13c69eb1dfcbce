"""Distillation: a small image tower learns what larger models see in the same pictures.

The teachers' vectors of the training split are computed once, of the pictures as they are; the student
sees random views of them. In its own space a linear map takes the student's vectors to the teachers',
which may be of any width; it is dropped when the checkpoint is written. Or the student moves into the
teacher's own space, so that the teacher's text tower finds what the student has indexed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.losses.views import cosine_regression, relational, teacher_contrast
from clipkit.options import option_fields
from clipkit.training.data import CaptionedPictures
from clipkit.training.distributed import gather_uneven, world_size
from clipkit.training.frozen_towers import FeaturesStopped
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs, readable_batch
from clipkit.training.methods.method import Method, Setup
from clipkit.training.methods.pairs import Pairs
from clipkit.training.registry import PairOptions
from clipkit.training.run_folder import FEATURES
from clipkit.training.teachers import (
    ModelTeacher,
    Teacher,
    open_teacher,
    side_by_side,
    unit_vectors,
)
from clipkit.training.validation import Scores, of_pairs, of_teacher

_FITTED = 4096  # pictures that the map is fitted to before the first step
_CHUNK = 32  # of them at a time
_PROBES = ("a dog on a beach", "birthday cake", "two people at a table")
_SAME_TEXT = 0.99  # cosine of one text by two copies of a tower, one of them in half precision


class Distill(Method):
    """Learn from teachers' vectors of the pictures and, if asked for, from captions beside them."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        options, config = setup.options, setup.config
        self._in_own_space = options.space == "own"
        self._pairs = Pairs(replace(setup, options=PairOptions())) if options.pairs else None
        # The teacher's text tower stays what it is: the student is to be found by it.
        trains_texts = self._pairs is not None and self._in_own_space
        self.sides = frozenset(("image", "text") if trains_texts else ("image",))
        self.text_views = int(self._pairs is not None)
        self.leaves_start = not self._in_own_space
        unused = config.options.keys() - option_fields(type(options)).keys()
        if self._pairs is None and (unused or config.loss != "auto"):
            name = min(unused, default="loss")
            raise InputError(
                f"{name} is set, but pairs is 0, so captions are not used; set --pairs"
            )
        self._teachers = [
            open_teacher(
                name,
                store=Path(config.out) / FEATURES,
                device=str(setup.towers.device),
                precision=config.precision,
                workers=config.workers,
            )
            for name in options.teachers
        ]
        self._identities = [teacher.identity for teacher in self._teachers]
        width = sum(teacher.dim for teacher in self._teachers)
        towers = setup.towers
        if not self._in_own_space:
            self._check_same_texts()
        self._map = torch.nn.Linear(
            towers.encoder.dim, width, device=towers.device, dtype=towers.logit_scale.dtype
        )
        self._targets = torch.empty(0)  # float16 (pictures, T), unit rows: the training split's
        # by image_id; empty if validation is by captions
        self._held_out_targets: dict[str, torch.Tensor] = {}
        self._terms: dict[str, torch.Tensor] = {}  # the last step's

    def _check_same_texts(self) -> None:
        """Raise InputError unless the start has the teacher's text tower, in whose space it will be."""
        encoder, options = self.setup.towers.encoder, self.setup.options
        teacher = self._teachers[0]
        if len(self._teachers) > 1 or not isinstance(teacher, ModelTeacher):
            raise InputError(
                f"space is teacher, but teacher is {options.teacher!r}; name one model, whose text "
                "tower the student is to be found by"
            )
        theirs = teacher.encoder.towers().encode_texts(_PROBES)
        same = encoder.dim == theirs.shape[1]
        if not same or float((encoder.encode_texts(_PROBES) * theirs).sum(1).min()) < _SAME_TEXT:
            start = self.setup.config.start
            raise InputError(
                f"space is teacher, but the text tower of {start} is not that of {teacher.name}; "
                "make a start of one's image tower and the other's text tower: "
                f"clipkit.towers.combine({start!r}, {teacher.name!r}, FOLDER)"
            )

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        own = dict(self._pairs.shared) if self._pairs else {}
        if self._in_own_space:
            own |= {f"teacher_map.{name}": value for name, value in self._map.named_parameters()}
        return own

    # ---- before the first step

    def prepare(
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        """Compute the teachers' vectors, and fit the map to the student as it is."""
        parts = self._vectors(inputs.data, on_progress, stop)
        # Networks' features share a large mean, which tells nothing of a picture. In the teacher's own
        # space vectors stay as they are.
        means = [p[p.any(1)].mean(0) if self._in_own_space else torch.zeros(()) for p in parts]
        self._targets = side_by_side([p - m for p, m in zip(parts, means, strict=True)])
        held_out = self.setup.held_out
        if held_out is not None and not all(map(len, held_out.owned)):
            parts = self._vectors(held_out, on_progress, stop)
            rows = side_by_side([p - m for p, m in zip(parts, means, strict=True)])
            self._held_out_targets = dict(zip(held_out.image_ids, rows, strict=True))
        self._teachers = []  # a large model need not stay in memory
        if self._in_own_space:
            self._fit_map(inputs)

    def _vectors(
        self,
        data: CaptionedPictures,
        on_progress: Callable[[str, int, int], None],
        stop: threading.Event,
    ) -> list[torch.Tensor]:
        """Return each teacher's unit rows of a split."""

        def vectors(teacher: Teacher) -> torch.Tensor:
            def on_batch(done: int) -> None:
                on_progress(f"pictures by {teacher.name}", done, len(data))
                if stop.is_set() and world_size() == 1:  # others would wait at the gather
                    raise FeaturesStopped

            return unit_vectors(teacher, data, on_batch)

        return [vectors(teacher) for teacher in self._teachers]

    @torch.no_grad()
    def _fit_map(self, inputs: Inputs) -> None:
        """Set the map to the least-squares one (ridge regression), from the first epoch's views.

        A map drawn at random would turn the student at first, and the start could not be compared.
        """
        towers, config = self.setup.towers, self.setup.config
        towers.mode(False)
        plans = inputs.data.plans(epoch=0, batch=self.setup.batch, seed=config.seed, texts=0)
        students, targets = [], []
        for plan in plans[: -(-_FITTED // self.setup.batch)]:
            batch = readable_batch(inputs, plan)
            rows = torch.split(torch.arange(len(batch.pictures[0])), config.chunk or _CHUNK)
            views = [towers.images(batch.pictures[0][part]) for part in rows]
            students.append(gather_uneven(torch.cat(views)).cpu().double())
            targets.append(self._targets[torch.from_numpy(batch.plan.pictures)].double())
        x, y = torch.cat(students), torch.cat(targets)
        x_mean, y_mean = x.mean(0), y.mean(0)
        covariance = (x - x_mean).T @ (x - x_mean) / len(x)
        # The fewer pictures there are for each weight, the less they are trusted.
        ridge = covariance.diag().mean() * x.shape[1] / len(x)
        covariance += torch.eye(x.shape[1]) * (ridge + 1e-12)
        weight = torch.linalg.solve(covariance, (x - x_mean).T @ (y - y_mean) / len(x)).T
        self._map.weight.copy_(weight)
        self._map.bias.copy_(y_mean - weight @ x_mean)

    # ---- in a step

    def mapped(self, students: torch.Tensor) -> torch.Tensor:
        """Return where the student's rows (B, D) are in the teachers' space: unit rows (B, T)."""
        return F.normalize(self._map(students), dim=1) if self._in_own_space else students

    def views(self, batch: Batch) -> Sequence[View]:
        if self._pairs:
            return self._pairs.views(batch)
        return (View(self.setup.towers.images, batch.pictures[0], side="image"),)

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        options, students = self.setup.options, rows[0]
        targets = self._targets[torch.from_numpy(batch.plan.pictures)].to(students)
        predictions = self.mapped(students)
        terms = {}
        if options.cosine:
            terms["cosine"] = cosine_regression(predictions, targets)
        if options.relational:
            terms["relational"] = relational(students, targets)
        if options.contrastive:
            temperature = options.teacher_temperature
            terms["contrastive"] = teacher_contrast(predictions, targets, temperature=temperature)
        if self._pairs:
            terms["pairs"] = self._pairs.loss(rows, batch)
        self._terms = {name: value.detach() for name, value in terms.items()}
        weighted = [getattr(options, name) * value for name, value in terms.items()]
        return torch.stack(weighted).sum()

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:
        if self._pairs:
            self._pairs.after_step(rows, step)

    def metrics(self) -> dict[str, float]:
        return {f"{name}_loss": float(value) for name, value in self._terms.items()}

    def evaluate(self, inputs: Inputs) -> Scores:
        """Measure recall with captions if every picture has one, else agreement with the teachers."""
        if not self._held_out_targets:
            return of_pairs(self.setup.towers, inputs)
        targets = torch.stack([self._held_out_targets[i] for i in inputs.data.image_ids])
        return of_teacher(self.setup.towers, inputs, targets, self.mapped)

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": self._identities}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, earlier, now in zip(
            self.setup.options.teachers, state["teachers"], self._identities, strict=True
        ):
            if earlier != now:
                raise InputError(
                    f"{name} has changed since the run began (it was {earlier}, now it is {now}); "
                    "restore it, or start a new run"
                )
