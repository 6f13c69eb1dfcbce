"""Recipe `heads`: train the towers' last projections on features of the frozen rest, computed once.

A head is the last part of OpenCLIP's architecture (a matrix, a linear layer, or a small MLP). It starts
from its current values, and the exported checkpoint has the same architecture.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

import clipkit
from clipkit import embed
from clipkit.catalog import VectorStore
from clipkit.embed import Encoded, encode_pictures
from clipkit.errors import ModelError
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.distributed import collect, gather_uneven, own_slice, world_size
from clipkit.training.inputs import (
    Batch,
    PictureInputs,
    Unreadable,
    UnreadablePicturesError,
    even_share,
    text_batch,
)
from clipkit.training.towers import TrainableTowers

_EVAL_CHUNK = 8192  # features are small


class FeaturesStopped(Exception):
    """The user stopped the run while features were computed; the finished ones are stored."""


@dataclass(frozen=True, slots=True)
class Head:
    """A tower's projection, attribute `name` of `owner`: a module, or a matrix (features @ matrix)."""

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
        """Within the block the tower returns what its head would get."""
        head = getattr(self.owner, self.name)
        if isinstance(head, torch.nn.Module) and self.name != "c_proj":
            hook = head.register_forward_hook(lambda _, inputs, __: inputs[0])
            try:
                yield
            finally:
                hook.remove()
            return
        # OpenCLIP leaves out a matrix that is None. A c_proj is not called: its weight and bias are
        # handed to the attention before it.
        substitute = _identity(head) if isinstance(head, torch.nn.Linear) else None
        setattr(self.owner, self.name, substitute)
        try:
            yield
        finally:
            setattr(self.owner, self.name, head)


def find_heads(model: torch.nn.Module) -> tuple[Head | None, Head | None]:
    """Return the projection of the image tower and of the text tower; None for a tower without one.

    What precedes a projection is pooled already: a row for each picture or text. Raises ModelError if
    neither has one.
    """
    visual: Any = model.visual
    text: Any = getattr(model, "text", model)
    around = getattr(visual, "head", None)  # OpenCLIP's layers behind a trunk of timm's
    image_heads = [
        (getattr(visual, "attnpool", None), "c_proj"),  # OpenCLIP's own ResNet
        (visual, "proj"),  # OpenCLIP's own ViT
        (around, "proj"),
        (around, "mlp"),
        _classifier(getattr(visual, "trunk", None)),  # MobileCLIP, EVA and others
    ]
    text_heads = [(text, "text_projection"), (text, "proj")]
    image_head, text_head = _first(image_heads), _first(text_heads)
    if image_head is None and text_head is None:
        raise ModelError("neither tower ends in a projection to train; use recipe lora or full")
    return image_head, text_head


def _classifier(trunk: Any) -> tuple[Any, str]:
    """Return the place of the last linear layer of timm's trunk, which OpenCLIP uses as projection."""
    layer = trunk.get_classifier() if hasattr(trunk, "get_classifier") else None
    if not isinstance(layer, torch.nn.Linear):
        return None, ""
    path = next(name for name, module in trunk.named_modules() if module is layer)
    owner, _, name = path.rpartition(".")
    return trunk.get_submodule(owner), name


def _first(candidates: Iterable[tuple[Any, str]]) -> Head | None:
    for owner, name in candidates:
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
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


class FrozenTowers:
    """Heads over features: a `towers.Towers` whose inputs are features, not pictures and tokens."""

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

    def features(
        self,
        inputs: PictureInputs,
        store: Path,
        on_batch: Callable[[str, int, int], None],
        stop: threading.Event,
    ) -> HeadInputs:
        """Compute what the frozen towers, without their heads, make of a split.

        Features are stored by encoder, arithmetic and content: those of other weights, pictures or
        captions are never used, and a run that was stopped or killed goes on with what is missing.
        on_batch: gets "pictures" or "texts", the number done and the total. Raises FeaturesStopped
        once `stop` is set.
        """
        data = inputs.data
        dtype = str(self._towers.compute).removeprefix("torch.")
        space = f"{self._towers.encoder.encoder_id}-{dtype}-{clipkit.__version__}"
        before = f"before-{self._image.name}" if self._image else "whole"

        def check(what: str, done: int, total: int) -> None:
            on_batch(what, done, total)
            if stop.is_set() and world_size() == 1:  # others would wait for this one at the gather
                raise FeaturesStopped

        with (
            torch.no_grad(),
            # with the fingerprint: an image_id is whatever the dataset says, unique within it
            VectorStore(store, f"{space}/{before}/{data.fingerprint()}/pictures") as pictures,
            self._image.removed() if self._image else nullcontext(),
        ):
            image_features, broken = self._picture_features(
                inputs, pictures, lambda done: check("pictures", done, len(data))
            )
        with (
            torch.no_grad(),
            VectorStore(store, f"{space}/texts") as texts,
            self._text.removed() if self._text else nullcontext(),
        ):
            text_features = self._text_features(
                data, texts, lambda done: check("texts", done, len(data.texts))
            )
        return HeadInputs(data, image_features, text_features, broken)

    def _picture_features(
        self, inputs: PictureInputs, store: VectorStore, on_batch: Callable[[int], None]
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Return the features (N, F) and which pictures have none, with the reasons."""
        encoder, data = self._towers.encoder, inputs.data
        share = range(len(data))[even_share(len(data))]
        keys = {picture: data.image_ids[picture].encode() for picture in share}
        rows = store.get(keys.values())

        def encode(pixels: list[torch.Tensor]) -> npt.NDArray[np.float32]:
            features = encoder.spread(self._towers.image_features, torch.stack(pixels))
            return features.float().cpu().numpy()

        def lookup(_: str) -> object | None:
            return None  # only pictures whose features are missing are read

        results = encode_pictures(
            [picture for picture, key in keys.items() if key not in rows],
            lambda: encoder,
            read=inputs.read,
            lookup=lookup,
            prepare=lambda _, __, file, admit: (inputs.served(file, admit), None),
            encode=encode,
            workers=inputs.workers,
        )
        broken: dict[int, str] = {}
        with closing(results):
            for result in results:
                if isinstance(result, embed.Unreadable):
                    broken[result.item] = f"{data.paths[result.item]}: {result.error}"
                if isinstance(result, Encoded):
                    new = [keys[picture.item] for picture in result.pictures]
                    store.put(new, result.vectors)
                    rows.update(zip(new, result.vectors, strict=True))
                    on_batch(len(rows))
        broken = {p: why for part in collect(broken) for p, why in part.items()}
        if len(broken) == len(data):
            raise UnreadablePicturesError(data, broken)
        width = max(collect(len(next(iter(rows.values()), ()))))
        own = np.zeros((len(keys), width), np.float32)
        for at, key in enumerate(keys.values()):
            if key in rows:
                own[at] = rows[key]
        return gather_uneven(torch.from_numpy(own)), broken

    def _text_features(
        self, data: CaptionedPictures, store: VectorStore, on_batch: Callable[[int], None]
    ) -> torch.Tensor:
        share = data.texts[even_share(len(data.texts))]
        keys = {hashlib.blake2b(t.encode(), digest_size=16).digest(): t for t in share}
        rows = store.get(keys)
        missing = [key for key in keys if key not in rows]
        size = text_batch(self._towers.encoder)
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            tokens = self._towers.encoder.tokenize([keys[key] for key in batch])
            vectors = self._towers.text_features(tokens).float().cpu().numpy()
            store.put(batch, vectors)
            rows.update(zip(batch, vectors, strict=True))
            on_batch(len(rows))
        if not keys:  # torch.cat, which joins the processes' rows, leaves out a row of no width
            return gather_uneven(torch.empty(0))
        return gather_uneven(torch.from_numpy(np.stack([rows[key] for key in keys])))


@dataclass(frozen=True, slots=True, eq=False)
class HeadInputs:
    """The features of a split; see `inputs.Inputs`."""

    data: CaptionedPictures
    image_features: torch.Tensor  # float32 (pictures, F)
    text_features: torch.Tensor  # float32 (distinct captions, G)
    broken: Mapping[int, str]  # pictures that have no features, with the reasons

    def without(self, pictures: Collection[int]) -> HeadInputs:
        kept = [number for number in range(len(self.data)) if number not in pictures]
        data = self.data.without(pictures)
        return HeadInputs(data, self.image_features[kept], self.text_features, {})

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch | Unreadable]:
        for plan in plans:
            if broken := {int(p): self.broken[p] for p in plan.pictures if p in self.broken}:
                yield Unreadable(broken)
                continue
            own = own_slice(len(plan.pictures))
            images = self.image_features[torch.from_numpy(plan.pictures[own])]
            texts = [self.text_features[torch.from_numpy(view)] for view in plan.texts[:, own]]
            yield Batch(plan, self.data, (images,), texts, [torch.arange(len(images))] * len(texts))

    def pictures(self) -> Generator[torch.Tensor]:
        yield from _chunks(self.image_features)
        if self.broken:
            raise UnreadablePicturesError(self.data, self.broken)

    def captions(self) -> Generator[torch.Tensor]:
        return _chunks(self.text_features)


def _chunks(features: torch.Tensor) -> Generator[torch.Tensor]:
    yield from torch.split(features[even_share(len(features))], _EVAL_CHUNK)
