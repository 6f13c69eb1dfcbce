"""How fast are models evaluated? clipkit against CLIP Benchmark, side by side in one run.

    python tests/bench/bench_eval.py [--pictures 2000] [--classes 100] [--templates 80]
                                     [--retrieval 1000] [--model SPEC] [--repeats 1]

Two jobs on the same files and the same weights (ViT-B-32 at random from a seed, or `--model`):
zero-shot classification of `--pictures` pictures into `--classes` of ImageNet's classes with OpenAI's
first `--templates` templates, and retrieval among `--retrieval` pictures with five captions each.

    CLIP Benchmark   its own `evaluate` at its own batch size, in float32, and with autocast (its
                     default, "amp") where the processor computes in bfloat16 or with --amp:
                     elsewhere bfloat16 is emulated; pictures by OpenCLIP's transform
    clipkit          `evaluate_zero_shot` and `evaluate_retrieval`, in the precision that it chooses and
                     in float32: cold, then once more with the features kept by the first run

Both sides load the model and decode the pictures inside the time taken; importing libraries is left
out. clipkit's time includes what it does beyond: intervals, calibration, thumbnails of mistakes.
Pictures are JPEGs of `--side` pixels: at the tower's own size, the default, both sides see the same
pixels, and clipkit's float32 figures must be CLIP Benchmark's. With $CLIPKIT_DATA set, photos and
captions are those of its flickr8k/, which have that size, under random labels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_indexing import save_vit_b_32
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

from clipkit import checkpoint
from clipkit.lazy_encoder import LazyEncoder
from clipkit.sources import PictureFile
from eval.data import Captioned, Labelled, SourcePictures, open_captioned
from eval.features import FeatureCache
from eval.prompts import Templates, load_classes, load_templates
from eval.reports import EvalReport
from eval.retrieval import evaluate_retrieval
from eval.session import Session
from eval.zero_shot import evaluate_zero_shot

KS = (1, 5, 10)
THEIR_BATCH = 64  # CLIP Benchmark's default
AGREE = 0.002  # a near-tie that falls the other way costs 1 / pictures


# ---- the jobs


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    name: str
    data: Any
    ours: Callable[[LazyEncoder, Session], EvalReport]
    theirs: Callable[[Any, Any, Any, bool], Mapping[str, float]]
    names: Mapping[str, str]  # clipkit's metric -> CLIP Benchmark's


def zero_shot_job(
    files: SourcePictures, classes: Sequence[str], templates: Templates, seed: int
) -> Job:
    labels = np.random.default_rng(seed).integers(0, len(classes), len(files))
    data = Labelled("bench", None, files, tuple(classes), labels, None)
    texts = [text.replace("{}", "{c}") for text in templates.texts]

    def ours(encoder: LazyEncoder, session: Session) -> EvalReport:
        return evaluate_zero_shot(encoder, data, templates=templates, session=session)

    def theirs(model: Any, transform: Any, tokenizer: Any, amp: bool) -> Mapping[str, float]:
        loader = _loader(Pictures(files, transform, labels.tolist(), classes))
        return zeroshot_classification.evaluate(
            model, loader, tokenizer, list(classes), texts, "cpu", amp=amp
        )

    same = {"acc@1": "acc1", "acc@5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    title = f"zero-shot, {len(files):,} pictures, {len(texts)} x {len(classes)} prompts"
    return Job(title, data, ours, theirs, same)


def retrieval_job(data: Captioned) -> Job:
    captions: list[list[str]] = [[] for _ in range(len(data.pictures))]
    for text, row in zip(data.captions, data.owner, strict=True):
        captions[row].append(text)

    def ours(encoder: LazyEncoder, session: Session) -> EvalReport:
        return evaluate_retrieval(encoder, data, ks=KS, session=session)

    def collate(batch: list[Any]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([picture for picture, _ in batch]), [texts for _, texts in batch]

    def theirs(model: Any, transform: Any, tokenizer: Any, amp: bool) -> Mapping[str, float]:
        loader = _loader(Pictures(data.pictures, transform, captions, ()), collate)
        return zeroshot_retrieval.evaluate(
            model, loader, tokenizer, "cpu", amp=amp, recall_k_list=list(KS)
        )

    ways = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}
    same = {f"{mine}/R@{k}": f"{yours}@{k}" for mine, yours in ways.items() for k in KS}
    title = f"retrieval, {len(data.pictures):,} pictures, {len(data.captions):,} captions"
    return Job(title, data, ours, theirs, same)


class Pictures(torch.utils.data.Dataset[Any]):
    """Files as CLIP Benchmark's datasets give them: through Pillow and OpenCLIP's transform."""

    def __init__(
        self, files: Any, transform: Any, answers: Sequence[Any], classes: Sequence[str]
    ) -> None:
        self.paths = [_path(files, row) for row in range(len(files))]
        self.transform, self.answers, self.classes = transform, answers, classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, Any]:
        return self.transform(Image.open(self.paths[row]).convert("RGB")), self.answers[row]


def _path(files: Any, row: int) -> Path:
    while not isinstance(files, SourcePictures):  # a subset of files
        files, row = files.pictures, files.rows[row]
    return files.pictures[row].path


def _loader(data: Pictures, collate: Any = None) -> Any:
    return torch.utils.data.DataLoader(
        data, batch_size=THEIR_BATCH, num_workers=min(4, os.cpu_count() or 1), collate_fn=collate
    )


# ---- CLIP Benchmark's side


def load_open_clip(spec: str) -> tuple[Any, Any, Any]:
    import open_clip

    folder = checkpoint.find_folder(spec)
    if folder is None:
        sys.exit(f"--model {spec}: give builtin or a checkpoint's folder")
    kept = {}
    if (folder / checkpoint.TEXT_CONFIG_FILE).is_file():
        # OpenCLIP would ask the hub for a Hugging Face text tower's settings; they lie here too.
        text = checkpoint.read_config(folder)[0]["text_cfg"]
        kept["text_cfg"] = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name, **kept)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int]) -> list[float]:
    """CLIP Benchmark's own, but for its last step, which today's NumPy refuses (1.6.2)."""
    best = output.topk(max(topk), 1, True, True)[1].t()
    correct = best.eq(target.view(1, -1).expand_as(best))
    return [correct[:k].reshape(-1).float().sum(0).item() / len(target) for k in topk]


@contextmanager
def timed(module: Any, name: str, into: dict[str, float]) -> Iterator[None]:
    """Adds the time spent in module.name to into[name]."""
    function = getattr(module, name)

    def around(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            into[name] = into.get(name, 0.0) + time.perf_counter() - started

    setattr(module, name, around)
    try:
        yield
    finally:
        setattr(module, name, function)


# ---- side by side


@dataclass(eq=False)
class Way:
    name: str
    seconds: list[float] = field(default_factory=list)
    phases: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_theirs(job: Job, spec: str, way: Way, *, amp: bool) -> None:
    phases: dict[str, float] = {}
    started = time.perf_counter()
    loaded = load_open_clip(spec)
    phases["loading"] = time.perf_counter() - started
    with (
        timed(zeroshot_classification, "zero_shot_classifier", phases),
        timed(zeroshot_classification, "run_classification", phases),
    ):
        figures = job.theirs(*loaded, amp)
    way.seconds.append(time.perf_counter() - started)
    way.figures = {mine: figures[yours] for mine, yours in job.names.items()}
    way.phases = phases


def run_ours(job: Job, spec: str, way: Way, *, precision: str, cache: Path) -> None:
    started = time.perf_counter()
    encoder = LazyEncoder(spec, device="cpu", precision=precision)
    report = job.ours(encoder, Session(FeatureCache(cache)))
    way.seconds.append(time.perf_counter() - started)
    way.figures = {name: report.metrics[name].value for name in job.names}
    way.phases = report.seconds


def compare(job: Job, spec: str, precisions: Sequence[str], *, repeats: int, amp: bool) -> bool:
    """Run and print one job; whether clipkit's float32 figures are CLIP Benchmark's."""
    theirs = {False: Way("CLIP Benchmark, float32")} | (
        {True: Way("CLIP Benchmark, amp")} if amp else {}
    )
    ours = {
        (precision, state): Way(f"clipkit, {precision}, {state}")
        for precision in precisions
        for state in ("cold", "cached")
    }
    for _ in range(repeats):
        for with_amp, way in theirs.items():
            run_theirs(job, spec, way, amp=with_amp)
        for precision in precisions:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "cached"):
                    way = ours[precision, state]
                    run_ours(job, spec, way, precision=precision, cache=Path(cache))
    best = min(way.median for way in theirs.values())
    print(f"\n{job.name}\n{'':<28} {'seconds':>8} {'ratio':>7}  phases", flush=True)
    for way in (*theirs.values(), *ours.values()):
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in way.phases.items())
        print(f"{way.name:<28} {way.median:8.1f} {best / way.median:7.1f}  {phases}")
    reference, mine = theirs[False].figures, ours["float32", "cold"].figures
    apart = max(abs(reference[name] - mine[name]) for name in job.names)
    shown = ", ".join(f"{name} {mine[name]:.4f}/{reference[name]:.4f}" for name in job.names)
    same = apart <= AGREE and ours["float32", "cached"].figures == mine
    print(f"float32 figures, clipkit/CLIP Benchmark: {shown}")
    print(f"{'the same' if same else 'NOT THE SAME'}: at most {apart:.5f} apart")
    return same


# ---- pictures


def made_pictures(folder: Path, count: int, side: int, seed: int) -> SourcePictures:
    """`count` JPEGs of coloured squares under noise, `side` pixels."""
    names = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        squares = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        pixels = np.asarray(squares.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        noisy = pixels + rng.normal(0, 12, pixels.shape).astype(np.float32)
        names.append(f"{number:05}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / names[-1], quality=90)
    return SourcePictures(tuple(names), tuple(PictureFile(folder / name) for name in names))


def made_captions(count: int, seed: int) -> tuple[str, ...]:
    """Sentences of about the length that people write, from ImageNet's class names."""
    rng = np.random.default_rng(seed)
    nouns = load_classes("imagenet1k")
    frames = ("a {} next to a {} in the grass", "two people look at a {} and a {}", "{} and {}")
    return tuple(
        frames[i % len(frames)].format(*rng.choice(nouns, 2, replace=False)) for i in range(count)
    )


def read_or_make(args: argparse.Namespace, scratch: Path) -> tuple[Any, Captioned]:
    if data := os.environ.get("CLIPKIT_DATA"):
        photos = open_captioned(f"{data}/flickr8k/train.jsonl", limit=args.pictures).pictures
        return photos, open_captioned(f"{data}/flickr8k/dev.jsonl", limit=args.retrieval)
    files = made_pictures(scratch, max(args.pictures, args.retrieval), args.side, args.seed)

    def first(count: int) -> SourcePictures:
        return SourcePictures(files.names[:count], files.pictures[:count])

    return first(args.pictures), Captioned(
        "bench",
        None,
        first(args.retrieval),
        made_captions(5 * args.retrieval, args.seed),
        np.repeat(np.arange(args.retrieval), 5),
        ((),) * args.retrieval,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--pictures", type=int, default=2000)
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--templates", type=int, default=80)
    options.add_argument("--retrieval", type=int, default=1000)
    options.add_argument("--side", type=int, default=224)
    options.add_argument(
        "--model", help="builtin or a checkpoint's folder; default ViT-B-32, random"
    )
    options.add_argument("--amp", action="store_true", help="CLIP Benchmark with autocast, too")
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    zeroshot_classification.accuracy = accuracy
    for module in (zeroshot_classification, zeroshot_retrieval):
        module.tqdm = lambda rows: rows  # its progress bars would be among the figures
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pictures").mkdir()
        pictures, captioned = read_or_make(args, Path(scratch) / "pictures")
        spec = args.model or str(save_vit_b_32(Path(scratch) / "vit", seed=args.seed))
        templates = Templates("bench", load_templates("imagenet1k").texts[: args.templates])
        jobs = (
            zero_shot_job(
                pictures, load_classes("imagenet1k")[: args.classes], templates, args.seed
            ),
            retrieval_job(captioned),
        )
        chosen = LazyEncoder(spec, device="cpu").precision
        print(
            f"{args.model or 'ViT-B-32, random'}; {args.repeats} repeats; {os.cpu_count()} cores, torch "
            f"{torch.__version__} with {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; ratios are to the faster CLIP Benchmark"
        )
        same = [
            compare(
                job,
                spec,
                tuple(dict.fromkeys((chosen, "float32"))),
                repeats=args.repeats,
                amp=args.amp or chosen == "bfloat16",
            )
            for job in jobs
        ]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
