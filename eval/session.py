"""What all evaluators share: the session that they run in, and the results that become a report."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from clipkit.arrays import Float32, Float64
from clipkit.metrics import Interval
from eval.data import Captioned, Labelled, Pictures
from eval.features import (
    Encoder,
    FeatureCache,
    Features,
    OnProgress,
    Stopped,
    Transform,
    logit_scale,
    no_progress,
    picture_features,
    text_features,
)
from eval.reports.report import EvalReport


@dataclass(frozen=True, slots=True)
class Session:
    """Feature cache, random seed, progress callback and stop flag of one run of evaluations."""

    cache: FeatureCache = field(default_factory=lambda: FeatureCache(None))
    seed: int = 0
    on_progress: OnProgress = no_progress  # what, done, total
    stop: threading.Event = field(default_factory=threading.Event)

    def picture_features(
        self, encoder: Encoder, pictures: Pictures, *, transform: Transform | None = None
    ) -> Features:
        """Call `eval.features.picture_features` with this cache and these callbacks."""
        return picture_features(
            encoder,
            pictures,
            cache=self.cache,
            transform=transform,
            on_progress=self.on_progress,
            stop=self.stop,
        )

    def text_features(self, encoder: Encoder, texts: Sequence[str]) -> Float32:
        """Call `eval.features.text_features` with this cache and these callbacks."""
        return text_features(
            encoder, texts, cache=self.cache, on_progress=self.on_progress, stop=self.stop
        )

    def logit_scale(self, encoder: Encoder) -> float:
        """Return the factor by which the model multiplies cosines."""
        return logit_scale(encoder, self.cache)

    def step(self, what: str, done: int = 0, total: int = 1) -> None:
        """Report progress. Raises Stopped if the flag is set."""
        if self.stop.is_set():
            raise Stopped(f"stopped before {what}; the features are kept")
        self.on_progress(what, done, total)


@dataclass(slots=True, eq=False)
class Results:
    """What an evaluator has measured so far; `report` makes an EvalReport of it.

    `tables`, `curves`, `reliability`, `scatter`, `confusion` and `mistakes` have the keys that
    eval/reports/html.py lists.
    """

    task: str
    metrics: dict[str, Interval] = field(default_factory=dict)
    samples: dict[str, Float64] = field(default_factory=dict)  # per unit, their mean the metric
    settings: dict[str, Any] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)  # metrics; see `EvalReport.headline`
    warnings: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    tables: list[Mapping[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    reliability: list[Mapping[str, Any]] = field(default_factory=list)
    scatter: list[Mapping[str, Any]] = field(default_factory=list)
    confusion: Mapping[str, Any] | None = None
    mistakes: list[Mapping[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _lap_began: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap, or since the start, under a name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._lap_began
        self._lap_began = now

    @property
    def details(self) -> dict[str, Any]:
        """Return what the HTML page shows beside the metrics."""
        names = ("headline", "tables", "curves", "reliability", "scatter", "confusion", "mistakes")
        details = {"words": self.sentences} | {name: getattr(self, name) for name in names}
        return {key: value for key, value in details.items() if value}

    def report(
        self,
        session: Session,
        *,
        n: Mapping[str, int],
        fingerprint: str,
        dataset: str = "vectors",
        split: str | None = None,
        model: str = "",
        encoder_id: str = "",
    ) -> EvalReport:
        """Return the report; the time since the last lap counts as "figures"."""
        self.lap("figures")
        return EvalReport(
            task=self.task,
            dataset=dataset,
            split=split,
            model=model,
            encoder_id=encoder_id,
            n=n,
            metrics=self.metrics,
            settings={**self.settings, "seed": session.seed},
            fingerprint=fingerprint,
            warnings=tuple(dict.fromkeys(self.warnings)),
            details=self.details,
            seconds=self.seconds,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            samples=self.samples,
        )

    def report_on(
        self,
        session: Session,
        encoder: Encoder,
        data: Captioned | Labelled,
        features: Features,
        *,
        fingerprint: str,
        n: Mapping[str, int] | None = None,
    ) -> EvalReport:
        """Return the report of one model on one dataset, whose counts, precision, device,
        subset and warnings are filled in; `n` adds further counts."""
        self.settings |= {"precision": encoder.precision, "device": features.device}
        if data.subset:
            self.settings["subset"] = data.subset
        self.warnings = [*data.warnings, *features.warnings, *self.warnings]
        skipped = {"skipped": len(features.skipped)} if features.skipped else {}
        return self.report(
            session,
            n={"pictures": len(features.rows), **(n or {}), **skipped},
            fingerprint=fingerprint,
            dataset=data.name,
            split=data.split,
            model=encoder.spec,
            encoder_id=encoder.encoder_id,
        )
