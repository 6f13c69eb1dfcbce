"""Recipe `heads`: the towers' own last projections, trained on features that are computed once.

A head is what OpenCLIP's architecture ends with (a matrix, a linear layer, or a small MLP), starting
from its current values: the exported checkpoint is the same architecture and needs no folding.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import ModelError
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.distributed import collect, gather_uneven, own_slice, rank, world_size
from clipkit.training.inputs import Batch, Inputs, even_share
from clipkit.training.towers import TrainableTowers

_EVAL_CHUNK = 8192  # features are small


class FeaturesStopped(Exception):
    """The user stopped the run while features were computed; those that were are kept."""


@dataclass(frozen=True, slots=True)
class Head:
    """The attribute `name` of `owner`: a module, or a matrix that features are multiplied by."""

    owner: torch.nn.Module
    name: str

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        head = getattr(self.owner, self.name)
        result: torch.Tensor
        result = head(features) if isinstance(head, torch.nn.Module) else features @ head
        return result

    def parameters(self) -> list[torch.nn.Parameter]:
        head = getattr(self.owner, self.name)
        return list(head.parameters()) if isinstance(head, torch.nn.Module) else [head]

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Within, the tower gives what its head would be given."""
        head = getattr(self.owner, self.name)
        if not isinstance(head, torch.nn.Module) or self.name == "text_projection":
            nothing: Any = None  # OpenCLIP leaves out a projection that is None
        elif isinstance(head, torch.nn.Linear) and self.name == "c_proj":
            nothing = _identity(head)  # read as a weight and a bias, not called
        else:
            nothing = torch.nn.Identity()
        setattr(self.owner, self.name, nothing)
        try:
            yield
        finally:
            setattr(self.owner, self.name, head)


def find_heads(model: torch.nn.Module) -> tuple[Head | None, Head | None]:
    """The image tower's and the text tower's projection; None where a tower ends without one.

    ModelError if both do.
    """
    visual: Any = model.visual
    text: Any = getattr(model, "text", model)
    attention_pool = getattr(visual, "attnpool", None)
    image_heads = [
        (getattr(visual, "trunk", None), "head"),  # timm's classifier as projection
        (visual, "head"),  # OpenCLIP's around timm
        (visual, "proj"),  # OpenCLIP's own ViT
        (attention_pool, "c_proj"),  # OpenCLIP's own ResNet
    ]
    text_heads = [(text, "text_projection"), (text, "proj")]
    image, words = _first(reversed(image_heads)), _first(text_heads)
    if image is None and words is None:
        raise ModelError("neither tower ends in a projection to train; use recipe lora or full")
    return image, words


def _first(places: Iterable[tuple[Any, str]]) -> Head | None:
    for owner, name in places:
        value = getattr(owner, name, None)
        trainable = isinstance(value, torch.nn.Parameter) or (
            isinstance(value, torch.nn.Module) and any(True for _ in value.parameters())
        )
        if trainable:
            return Head(owner, name)
    return None


def _identity(like: torch.nn.Linear) -> torch.nn.Linear:
    width = like.in_features
    layer = torch.nn.Linear(width, width, device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


class FrozenTowers:
    """Heads over features: what `model.Towers` asks for, with features for pictures and tokens."""

    def __init__(self, towers: TrainableTowers, *, dropout: float) -> None:
        self.logit_scale, self.logit_bias = towers.logit_scale, towers.logit_bias
        self.encoder, self.device, self.model = towers.encoder, towers.device, towers.model
        self._image, self._text = find_heads(towers.model)
        self._dropout, self._training = dropout, False
        self._towers = towers

    def mode(self, training: bool) -> None:
        self._training = training

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._unit(inputs, self._image)

    def texts(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._unit(inputs, self._text)

    def _unit(self, inputs: torch.Tensor, head: Head | None) -> torch.Tensor:
        features = inputs.to(self.device, self.logit_scale.dtype)
        if head is not None:
            features = head(F.dropout(features, self._dropout, self._training))
        return F.normalize(features, dim=-1)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for head in (self._image, self._text) if head for p in head.parameters()]

    def features(
        self,
        inputs: Inputs,
        folder: Path,
        on_chunk: Callable[[str, int, int], None],
        stop: threading.Event,
    ) -> HeadInputs:
        """What the frozen towers make of a split, computed once: kept in `folder` by the encoder's
        and the data's identity, so that features of other weights or pictures are never taken.

        Every chunk is written as it is made: a run that was stopped or killed goes on from there.
        """
        encoder = self._towers.encoder
        dtype = str(self._towers.compute).removeprefix("torch.")
        name = f"{encoder.encoder_id}-{dtype}-{inputs.data.fingerprint()}"
        data = inputs.data
        pictures = self._kept(
            folder / f"{name}-pictures.npy",
            inputs.pictures,
            lambda chunk: encoder.spread(self._towers.image_features, chunk),
            self._image,
            lambda done: on_chunk("pictures", done, len(data)),
            stop,
        )
        texts = self._kept(
            folder / f"{name}-texts.npy",
            inputs.captions,
            self._towers.text_features,
            self._text,
            lambda done: on_chunk("texts", done, len(data.texts)),
            stop,
        )
        return HeadInputs(inputs.data, pictures, texts)

    def _kept(
        self,
        file: Path,
        chunks: Callable[[int], Generator[torch.Tensor]],
        encode: Callable[[torch.Tensor], torch.Tensor],
        head: Head | None,
        on_done: Callable[[int], None],
        stop: threading.Event,
    ) -> torch.Tensor:
        if all(collect(file.is_file())):
            return torch.from_numpy(np.load(file))
        file.parent.mkdir(parents=True, exist_ok=True)
        share = f"{rank() + 1}of{world_size()}"
        parts = _Parts(file.with_suffix(f".{share}.partial"))
        with (
            torch.no_grad(),
            head.removed() if head else nullcontext(),
            closing(chunks(parts.rows)) as remaining,
            parts.open() as handle,
        ):
            for chunk in remaining:
                parts.add(encode(chunk).float().cpu(), handle)
                on_done(parts.rows)
                if stop.is_set() and world_size() == 1:  # others would wait for this one below
                    raise FeaturesStopped
        features = gather_uneven(torch.cat(parts.made))
        if rank() == 0:
            aside = file.with_suffix(f".{os.getpid()}.partial")
            with aside.open("wb") as whole:
                np.save(whole, features.numpy())
            aside.replace(file)
        parts.path.unlink()
        return features


class _Parts:
    """Chunks of features in a file, one array behind the other, as far as an earlier run came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[torch.Tensor] = []
        self._whole = 0  # bytes of chunks that are whole
        # EOFError is the file's end, ValueError a chunk that a kill cut off.
        missing_or_over = (FileNotFoundError, EOFError, ValueError)
        with contextlib.suppress(*missing_or_over), path.open("rb") as handle:
            while True:
                self.made.append(torch.from_numpy(np.load(handle, allow_pickle=False)))
                self._whole = handle.tell()

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.made)

    def open(self) -> IO[bytes]:
        """To add to what is whole."""
        self.path.touch()
        handle = self.path.open("r+b")
        handle.seek(self._whole)
        handle.truncate()
        return handle

    def add(self, features: torch.Tensor, handle: IO[bytes]) -> None:
        np.save(handle, features.numpy())
        handle.flush()
        self.made.append(features)


@dataclass(frozen=True, slots=True, eq=False)
class HeadInputs:
    """A split as features (see `inputs.Inputs`)."""

    data: CaptionedPictures
    image_features: torch.Tensor  # float32 (pictures, F)
    text_features: torch.Tensor  # float32 (distinct captions, G)

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch]:
        for plan in plans:
            own = own_slice(len(plan.pictures))
            images = self.image_features[torch.from_numpy(plan.pictures[own])]
            yield Batch(plan, images, self.text_features[torch.from_numpy(plan.texts[own])], None)

    def pictures(self, first: int = 0) -> Generator[torch.Tensor]:
        return _shares(self.image_features, first)

    def captions(self, first: int = 0) -> Generator[torch.Tensor]:
        return _shares(self.text_features, first)


def _shares(features: torch.Tensor, first: int) -> Generator[torch.Tensor]:
    yield from torch.split(features[even_share(len(features))][first:], _EVAL_CHUNK)
