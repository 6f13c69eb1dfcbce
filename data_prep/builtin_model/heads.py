"""The first phase: train the heads alone, on features of the frozen towers, in large batches."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.model import CustomTextCLIP

from clipkit.losses.pairs import Same, info_nce
from clipkit.training.recipes import adamw, rate_factor
from data_prep.builtin_model.class_targets import SCALE, class_loss, how_often
from data_prep.builtin_model.sources import Example, caption
from data_prep.builtin_model.vocabulary import Names

_STEPS, _BATCH = 475, 1024
_PREPARED = 10  # epochs whose captions and names are drawn; then they come again
_DROPOUT = 0.3  # of the pictures' features: there are few pictures
_LABEL_SMOOTHING = 0.1
_HIGHEST = math.log(100.0)  # CLIP, section 2.5
_CLASS_WEIGHT = 3.0  # of what the classifier sees, beside the pairs


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A step's N pairs of picture and caption, and names beside them."""

    rows: list[int]
    captions: list[str]
    same: torch.Tensor  # bool (N, N): other pairs (picture, caption) that may belong together
    names: list[tuple[list[int], list[str]]]  # of each list: things, and a text of each


def epoch(
    examples: Sequence[Example], lists: Sequence[Names], *, size: int, rng: random.Random
) -> Iterator[Batch]:
    """Yield every picture once with one of its captions, in batches of about `size`, each with all
    things."""
    order = rng.sample(range(len(examples)), len(examples))
    count = math.ceil(len(examples) / size)
    for step in range(count):
        rows = order[step::count]
        stated = [caption(examples[i], rng) for i in rows]
        same = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        stating: dict[str, list[int]] = {}
        for place, (_, phrase) in enumerate(stated):
            stating.setdefault(phrase, []).append(place)
        for place, i in enumerate(rows):  # another's phrase may be true of this picture too
            for phrase in {*examples[i].phrases, *examples[i].keywords} & stating.keys():
                same[place, stating[phrase]] = True
        same.fill_diagonal_(False)
        names = [each.draw(rng, most=1000) for each in lists]
        yield Batch(rows, [text for text, _ in stated], same, names)


def train(
    model: CustomTextCLIP,
    examples: Sequence[Example],
    features: torch.Tensor,
    seen: torch.Tensor,
    lists: Sequence[Names],
    pool: Callable[[Sequence[str]], torch.Tensor],
    rng: random.Random,
    *,
    adjust: bool = True,
) -> None:
    """Train the heads and the scale.

    features: float32 (N, 1280), of the pictures. seen: float32 (T, C), the classifier's probabilities
    for the first T, which alone it teaches. pool: encodes texts with the frozen tower. adjust: leave
    out of what is learnt how often a thing shows.
    """
    prepared = [b for _ in range(_PREPARED) for b in epoch(examples, lists, size=_BATCH, rng=rng)]
    texts = {text: None for b in prepared for text in b.captions}
    texts |= {text: None for b in prepared for _, drawn in b.names for text in drawn}
    frozen = pool(list(texts))
    place = {text: number for number, text in enumerate(texts)}
    print(f"{len(place)} texts ready", flush=True)

    def encoded(drawn: Sequence[str]) -> torch.Tensor:
        return F.normalize(model.text.proj(frozen[[place[text] for text in drawn]]), dim=-1)

    class_scale = torch.nn.Parameter(torch.tensor(math.log(SCALE)))
    shown_of = [torch.from_numpy(each.classes).T for each in lists]
    often_of = how_often(seen, lists, adjust=adjust)
    trained = ("visual.head.", "text.proj.", "logit_scale")
    heads = [(n, p, 1e-3) for n, p in model.named_parameters() if n.startswith(trained)]
    optimizer = adamw([*heads, ("class_scale", class_scale, 1e-3)], weight_decay=0.1, beta2=0.98)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, total=_STEPS, warmup=0.1)
    )
    steps = (batch for _ in range(_STEPS) for batch in prepared)
    for done, batch in enumerate(islice(steps, _STEPS), start=1):
        dropped = F.dropout(features[batch.rows], _DROPOUT)
        pictures = F.normalize(model.visual.head(dropped), dim=-1)
        loss = info_nce(
            pictures,
            encoded(batch.captions),
            model.logit_scale,
            same=Same.of_marks(batch.same),
            label_smoothing=_LABEL_SMOOTHING,
        )
        photos = [place for place, i in enumerate(batch.rows) if i < len(seen)]
        classes = seen[[batch.rows[place] for place in photos]]
        for number, (things, drawn) in enumerate(batch.names):
            shown, often = classes @ shown_of[number][:, things], often_of[number][things]
            names = encoded(drawn)
            part = class_loss(pictures[photos], names, class_scale, shown, often)
            loss = loss + _CLASS_WEIGHT * lists[number].weight * part
        if not torch.isfinite(loss):
            sys.exit(f"the loss is {loss.item()} at step {done}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _HIGHEST)
            class_scale.clamp_(0, _HIGHEST)
        if done % 20 == 0:
            print(f"step {done} of {_STEPS}, loss {loss.item():.3f}", flush=True)
