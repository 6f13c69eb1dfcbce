"""Measure the gain of "Teach it" if it trains the text side only, so that an index needs no new vectors.

    python tests/bench/bench_teaching.py --data DIR [--seeds 5] [--marks 100 300 600]

DIR holds flickr8k/ and openclipart/ (default: $CLIPKIT_DATA). Marks are simulated: a picture is right
for its first caption. The pictures are Flickr8k's development photos, which `builtin` was not trained
on, and clip art whose captions name the illustrator, as in bench_new_user.py. For each seed 400
pictures are the test, whose recall (the mean of R@1, R@5 and R@10 both ways) and loss are measured; of
the marked rest 15 % validate. Recipe `heads` runs as in app.web.teaching_worker, with both projections
and with the text projection alone, on features that are computed once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_new_user import drawings

from clipkit import towers
from clipkit.sources import open_source
from clipkit.training import TrainConfig
from clipkit.training.data import CaptionedPictures, fitted_batch
from clipkit.training.frozen_towers import FrozenTowers, HeadInputs
from clipkit.training.inputs import PictureInputs
from clipkit.training.loop import Job, fit
from clipkit.training.recipes import choose_parameters
from clipkit.training.run_folder import RunFolder
from clipkit.training.towers import TrainableTowers
from clipkit.training.validation import Scores, evaluate
from clipkit.training.weights import choose_alpha, choose_drift
from data_prep.build import build
from data_prep.split import Fractions

TESTED, VALIDATION = 400, 0.15
KINDS: dict[str, dict[str, Any]] = {"both": {}, "text": {"image_rate": 0.0}}
R1 = "text_to_image/R@1"


def flickr8k(data: Path) -> list[dict[str, Any]]:
    folder = data / "flickr8k"
    rows = map(json.loads, (folder / "dev.jsonl").read_text("utf-8").splitlines())
    return [{"image": str(folder / row["image"]), "captions": row["captions"]} for row in rows]


def openclipart(data: Path) -> list[dict[str, Any]]:
    return [
        {"image": str(file), "captions": [f"{title}, drawn by {name}"]}
        for name, files in drawings(data / "openclipart").items()
        for file, title in files
    ]


class Lessons:
    """Runs of recipe `heads` over parts of one dataset, whose features are computed once."""

    def __init__(self, rows: list[dict[str, Any]], out: Path) -> None:
        out.mkdir()
        self._out = out
        source = out / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        build([open_source(f"jsonl:{source}")], out / "dataset", fractions=Fractions(0, 0))
        self._encoder = towers.load("builtin", device="cpu", precision="float32")
        self._start = {n: v.clone() for n, v in self._encoder.model.state_dict().items()}
        trainable = TrainableTowers(self._encoder, loss="infonce")
        pictures = PictureInputs(CaptionedPictures.read(out / "dataset", "train"), trainable)
        frozen = FrozenTowers(trainable, dropout=0.0)
        never = threading.Event()
        self._whole = frozen.features(pictures, out / "features", lambda *_: None, never)
        self._trainable = trainable
        self.pictures = len(self._whole.data)

    def part(self, pictures: Sequence[int], *, captions: int) -> HeadInputs:
        """Return some pictures with so many of their captions each."""
        whole = self._whole.data
        owned = [whole.owned[picture][:captions] for picture in pictures]
        texts = np.unique(np.concatenate(owned))
        data = CaptionedPictures(
            whole.folder,
            tuple(whole.image_ids[picture] for picture in pictures),
            tuple(whole.paths[picture] for picture in pictures),
            tuple(whole.texts[text] for text in texts),
            tuple(np.searchsorted(texts, some) for some in owned),
            whole.meanings[texts],
            0,
        )
        images = self._whole.image_features[list(pictures)]
        return HeadInputs(data, images, self._whole.text_features[texts])

    def start(self, test: HeadInputs) -> Scores:
        self._encoder.model.load_state_dict(self._start)
        return evaluate(FrozenTowers(self._trainable, dropout=0.0), test)

    def run(
        self, training: HeadInputs, validation: HeadInputs, test: HeadInputs, **changes: Any
    ) -> Scores:
        """Train from the start, mix with it as a run does, and measure."""
        config = TrainConfig.from_mapping(
            {"data": ".", "tensorboard": False, "checkpoint_every": 10**6, **changes}
        )
        model = self._encoder.model
        model.load_state_dict(self._start)
        batch = fitted_batch(len(training.data), most=1024)
        frozen = FrozenTowers(self._trainable, dropout=config.feature_dropout)
        trained = choose_parameters(frozen, config)
        plan = training.data.plans(epoch=0, batch=batch, seed=config.seed)[0]
        if config.drift < 0:
            drift = choose_drift(frozen, training, plan, chunk=batch)
            config = replace(config, drift=drift)
        folder = RunFolder(Path(tempfile.mkdtemp(dir=self._out)))
        folder.create({})
        job = Job(
            config=config,
            loss="infonce",
            batch=batch,
            chunk=batch,
            half=False,
            towers=frozen,
            trained=trained,
            inputs=training,
            validation=validation,
            folder=folder,
            on_progress=lambda _: None,
            stop=threading.Event(),
        )
        history = fit(job).history
        trained.load_state_dict(history.best_weights)
        frozen.mode(False)
        assert history.start is not None
        state = {n: v.clone() for n, v in model.state_dict().items() if n in trained.named}
        choose_alpha(
            model,
            self._start,
            state,
            lambda: evaluate(frozen, validation),
            at_start=history.start,
        )
        return evaluate(frozen, test)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--marks", type=int, nargs="*", default=[100, 300, 600])
    args = parser.parse_args()
    sets: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "flickr8k": flickr8k,
        "openclipart": openclipart,
    }
    with tempfile.TemporaryDirectory(prefix="teaching_") as out:
        for name, read in sets.items():
            lessons = Lessons(read(Path(args.data).absolute()), Path(out) / name)
            print(f"{name}: {lessons.pictures} pictures, mean recall (R@1 text to image; loss)")
            for marks in args.marks:
                if marks > lessons.pictures - TESTED:
                    continue
                table: dict[str, list[Scores]] = {kind: [] for kind in ("start", *KINDS)}
                began = time.process_time()
                for seed in range(args.seeds):
                    order = random.Random(seed).sample(range(lessons.pictures), TESTED + marks)
                    cut = TESTED + round(VALIDATION * marks)
                    test = lessons.part(order[:TESTED], captions=5)
                    validation = lessons.part(order[TESTED:cut], captions=1)
                    training = lessons.part(order[cut:], captions=1)
                    table["start"].append(lessons.start(test))
                    for kind, changes in KINDS.items():
                        scores = lessons.run(training, validation, test, seed=seed, **changes)
                        table[kind].append(scores)
                for kind, rows in table.items():
                    gains = [
                        100 * (row.mean_recall - start.mean_recall)
                        for row, start in zip(rows, table["start"], strict=True)
                    ]
                    print(
                        f"  {marks:4} marks, {kind:5}: "
                        f"{100 * np.mean([row.mean_recall for row in rows]):.2f} "
                        f"({100 * np.mean([row.recall[R1] for row in rows]):.2f}; "
                        f"{np.mean([row.loss for row in rows]):.3f}), gain {np.mean(gains):+.2f} "
                        f"± {np.std(gains, ddof=1) if args.seeds > 1 else 0.0:.2f}",
                        flush=True,
                    )
                print(f"        {time.process_time() - began:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
