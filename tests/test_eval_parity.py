"""The same figures as CLIP Benchmark, on the same weights, pictures and prompts.

Every case saves a small model, lets OpenCLIP load it for CLIP Benchmark's own `evaluate` functions, and
clipkit for its evaluators. The pictures already have the towers' size, so that both see the same pixels.
Only ties are treated otherwise: there CLIP Benchmark takes what a sort leaves first. Pictures whose
scores lie within TIE of another that matters are therefore left out, and few may be.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference_metrics
import torch
from conftest import TINY, WORDS, make_checkpoint
from PIL import Image
from test_towers import open_clip_reference

from clipkit import metrics
from clipkit.lazy_encoder import LazyEncoder
from eval.data import Captioned, Labelled
from eval.features import FeatureCache, picture_features, text_features
from eval.prompts import Templates
from eval.retrieval import evaluate_retrieval
from eval.zero_shot import class_vectors, evaluate_zero_shot

pytest.importorskip("clip_benchmark")
pytestmark = pytest.mark.parity

Checkpoint = Callable[..., Path]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
TOLERANCE = 1e-4
TIE = 1e-6  # cosines of the two sides differ by 2e-7 at most
CLASSES = tuple(WORDS[-8:])
TEMPLATES = Templates("three", ("a photo of a {}", "the blue {}", "{} of the {}"))
# (model, its seed, the data's seed)
CASES = [(kind, seed, seed) for kind in sorted(TINY) for seed in range(3)] + [
    ("trained", 0, seed) for seed in range(6)
]


class Stored:
    """PNG files in memory."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self.files = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        return f"{row}.png"

    def read(self, row: int) -> bytes:
        return self.files[row]


def painted(labels: np.ndarray, side: int, rng: np.random.Generator) -> list[Image.Image]:
    """A picture per label: the class's pattern of coloured squares, under noise of its own."""
    patterns = np.random.default_rng(0).integers(0, 256, (len(CLASSES), 4, 4, 3))
    pictures = []
    for label in labels:
        own = rng.integers(0, 256, (4, 4, 3))
        mixed = (0.6 * patterns[label] + 0.4 * own).astype(np.uint8)
        big = Image.fromarray(mixed).resize((side, side), Image.Resampling.NEAREST)
        grain = rng.normal(0, 20, (side, side, 3))
        pictures.append(Image.fromarray(np.clip(np.asarray(big) + grain, 0, 255).astype(np.uint8)))
    return pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT after some steps of InfoNCE: its scores mean something, as those of noise do not."""
    folder = make_checkpoint(tmp_path_factory.mktemp("trained"), "vit")
    train_lightly(folder, seed=0)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> Case:
    kind, seed, data_seed = request.param
    trained = kind == "trained"
    folder = request.getfixturevalue("trained") if trained else tiny_checkpoint(kind, seed=seed)
    return Case(folder, data_seed, trained=trained)


def train_lightly(folder: Path, *, seed: int) -> None:
    from safetensors.torch import save_file

    model, transform, tokenizer = open_clip_reference(folder)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    tokens = tokenizer([f"a photo of a {name}" for name in CLASSES])
    labels = np.tile(np.arange(len(CLASSES)), 3)
    for _ in range(25):
        batch = torch.stack([transform(picture) for picture in painted(labels, 32, rng)])
        images = model.encode_image(batch, normalize=True)
        logits = 20 * images @ model.encode_text(tokens, normalize=True).T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


class Case:
    """A model and pictures at its size, and CLIP Benchmark's way from there to its figures."""

    def __init__(self, folder: Path, seed: int, *, trained: bool) -> None:
        self.trained = trained
        self.encoder = LazyEncoder(str(folder), device="cpu", precision="float32")
        self.model, self.transform, self.tokenizer = open_clip_reference(folder)
        self.rng = np.random.default_rng(seed)
        self.labels = self.rng.integers(0, len(CLASSES), 48)
        pictures = painted(self.labels, self.encoder.towers().preferred_side, self.rng)
        self.stored = Stored(pictures)
        self.pixels = [self.transform(picture) for picture in pictures]
        none = FeatureCache(None)
        self.vectors = picture_features(self.encoder, self.stored, cache=none).vectors

    def labelled(self, targets: npt.NDArray[np.bool_] | None = None) -> Labelled:
        labels = self.labels if targets is None else None
        return Labelled("painted", None, self.stored, CLASSES, labels, targets)

    def zero_shot(self, data: Labelled, rows: Sequence[int]) -> dict[str, float]:
        """CLIP Benchmark's figures for these rows of `data`."""
        from clip_benchmark.metrics import zeroshot_classification

        zeroshot_classification.accuracy = accuracy
        answers = data.labels if data.labels is not None else data.targets
        items = [(self.pixels[row], torch.as_tensor(answers[row])) for row in rows]
        loader = torch.utils.data.DataLoader(Listed(items), batch_size=16)
        templates = [text.replace("{}", "{c}") for text in TEMPLATES.texts]
        return zeroshot_classification.evaluate(
            self.model, loader, self.tokenizer, CLASSES, templates, "cpu", amp=False
        )

    def retrieval(self, data: Captioned, rows: Sequence[int], ks: list[int]) -> dict[str, float]:
        from clip_benchmark.metrics import zeroshot_retrieval

        texts = [
            [c for c, o in zip(data.captions, data.owner, strict=True) if o == r] for r in rows
        ]
        items = [(self.pixels[r], t) for r, t in zip(rows, texts, strict=True)]

        def collate(batch: list[Any]) -> tuple[torch.Tensor, list[list[str]]]:
            return torch.stack([picture for picture, _ in batch]), [texts for _, texts in batch]

        loader = torch.utils.data.DataLoader(Listed(items), batch_size=16, collate_fn=collate)
        return zeroshot_retrieval.evaluate(
            self.model, loader, self.tokenizer, "cpu", amp=False, recall_k_list=ks
        )


class Listed(list[Any]):
    """A dataset as CLIP Benchmark expects it: with its classes."""

    classes = CLASSES


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int]) -> list[float]:
    """CLIP Benchmark's own, but for its last step: it makes a float of an array of shape (1,), which
    today's NumPy refuses (clip-benchmark 1.6.2)."""
    best = output.topk(max(topk), 1, True, True)[1].t()
    correct = best.eq(target.view(1, -1).expand_as(best))
    return [correct[:k].reshape(-1).float().sum(0).item() / len(target) for k in topk]


def clear_rows(scores: Floats, positive: Bools) -> list[int]:
    """Rows of scores (N, C) among which no positive and negative of one row or one column tie."""
    rows = np.arange(len(scores))
    while True:
        near = tied(scores[rows], positive[rows]) | tied(scores[rows].T, positive[rows].T).T
        if not near.any():
            return rows.tolist()
        rows = rows[~near.any(axis=1)]


def tied(scores: Floats, positive: Bools) -> Bools:
    """Which of scores (N, C) lie within TIE of one of the other kind in their row."""
    near = np.abs(scores[:, :, None] - scores[:, None, :]) < TIE
    return (near & (positive[:, :, None] != positive[:, None, :])).any(axis=2)


def test_accuracy_equals_clip_benchmarks(case: Case) -> None:
    data = case.labelled()
    scores = case.vectors @ class_vectors(case.encoder, CLASSES, TEMPLATES).T
    rows = clear_rows(scores, np.eye(len(CLASSES), dtype=bool)[case.labels])
    assert len(rows) >= 30
    ours = evaluate_zero_shot(
        case.encoder, data.select(rows), templates=TEMPLATES, calibrate=False
    ).metrics
    theirs = case.zero_shot(data, rows)
    for mine, yours in (
        ("acc@1", "acc1"),
        ("acc@5", "acc5"),
        ("mean_per_class_recall", "mean_per_class_recall"),
    ):
        assert ours[mine].value == pytest.approx(theirs[yours], abs=TOLERANCE)
    if case.trained:
        assert ours["acc@1"].value > 0.25, "chance is 0.125: the comparison is not one of noise"


def test_map_equals_clip_benchmarks(case: Case) -> None:
    """With several labels a picture."""
    targets = case.rng.random((len(case.labels), len(CLASSES))) < 0.25
    targets[np.arange(len(targets)), case.labels] = True
    scores = case.vectors @ class_vectors(case.encoder, CLASSES, TEMPLATES).T
    rows = clear_rows(scores, targets)
    assert len(rows) >= 30
    data = case.labelled(targets)
    ours = evaluate_zero_shot(case.encoder, data.select(rows), templates=TEMPLATES).metrics["mAP"]
    theirs = case.zero_shot(data, rows)["mean_average_precision"]
    assert ours.value == pytest.approx(theirs, abs=TOLERANCE)


def test_recall_equals_clip_benchmarks(case: Case) -> None:
    """Recall@1, 5, 10 both ways, with one to four captions a picture, all of them different."""
    pairs = [f"{a} {b}" for a, b in permutations(WORDS, 2)]
    counts = case.rng.integers(1, 5, len(case.labels))
    owner = np.repeat(np.arange(len(counts)), counts)
    chosen = case.rng.permutation(len(pairs))[: len(owner)]
    captions = tuple(
        f"a {pairs[i]} {CLASSES[case.labels[row]]}" for i, row in zip(chosen, owner, strict=True)
    )
    data = Captioned("painted", None, case.stored, captions, owner, ((),) * len(counts))
    texts = text_features(case.encoder, captions, cache=FeatureCache(None))
    rows = clear_rows(case.vectors @ texts.T, np.arange(len(counts))[:, None] == owner)
    assert len(rows) >= 20
    ours = evaluate_retrieval(case.encoder, data.select(rows), ks=(1, 5, 10)).metrics
    theirs = case.retrieval(data, rows, [1, 5, 10])
    for k in (1, 5, 10):
        image, text = (theirs[f"{way}_retrieval_recall@{k}"] for way in ("image", "text"))
        assert ours[f"text_to_image/R@{k}"].value == pytest.approx(image, abs=TOLERANCE)
        assert ours[f"image_to_text/R@{k}"].value == pytest.approx(text, abs=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_ap_and_calibration_equal_scikit_learns(seed: int) -> None:
    """On scores with many ties, too, which scikit-learn takes as one threshold."""
    from scipy.special import softmax
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import average_precision_score, log_loss

    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(80, 6)).round(1)
    targets = rng.random((80, 6)) < 0.3
    expected = average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(metrics.average_precision(scores, targets), expected, atol=1e-12)
    labels = rng.integers(0, 6, 80)
    expected_loss = log_loss(labels, softmax(scores, axis=1))
    assert reference_metrics.negative_log_likelihood(scores, labels) == pytest.approx(expected_loss)
    probabilities = softmax(3 * scores, axis=1)
    right = probabilities.argmax(axis=1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(axis=1), n_bins=15)
    bins = metrics.reliability(probabilities, labels, bins=15)
    np.testing.assert_allclose([b.accuracy for b in bins], accuracy)
    np.testing.assert_allclose([b.confidence for b in bins], confidence)
