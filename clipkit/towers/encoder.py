"""The dual encoder: pictures and texts to unit vectors of one space.

Architectures, weights and tokenizers are OpenCLIP's. Three things are done differently here. Pictures
are resized as uint8 in the decode workers, by an antialiased resize in torch that is several times
faster than PIL's and equal to it within a rounding step. Texts are cut behind their last token where
that leaves the embedding the same. On a CPU, each core encodes a part of the batch by itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  the field's own name for it
from PIL import Image

from clipkit import checkpoint
from clipkit.checkpoint import TowerConfig
from clipkit.errors import InputError, ModelError
from clipkit.images import rgb_array
from clipkit.towers.folding import fold_batch_norms

Precision = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PART = 8  # rows that a core encodes at a time: enough for matrix products, few enough for its cache


class DualEncoder:
    """Encode pictures and texts as unit vectors of one space. `load` makes it; threads may share it."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        spec: str,
        identity: checkpoint.Identity,
        model_cfg: Mapping[str, Any],
        preprocess_cfg: Mapping[str, Any],
        device: torch.device,
        precision: Precision,
        untrained: Set[str] = frozenset(),
    ) -> None:
        """untrained: the towers, "image" and "text", whose weights are random."""
        self.spec = spec
        self.untrained = frozenset(untrained)
        self.encoder_id, self.space_id = identity
        self.config = TowerConfig.from_open_clip(model_cfg, preprocess_cfg)
        self.device = device
        self.precision = precision
        self.model = model.eval().requires_grad_(False).to(device)
        if device.type == "cpu":
            # The text tower stays float32: with bfloat16 weights the built-in one took 4.0 instead of
            # 6.8 ms a query, but 0.9 % of first hits and 0.5 % of the ten best changed (Flickr8k).
            self.model.float()
            self.model.visual.to(DTYPES[precision])
        else:
            self.model.to(DTYPES[precision])
        # Convolutions run 1.5 to 3 times faster with the channels last; transformers do not mind.
        self.model = self.model.to(memory_format=torch.channels_last)
        blank = torch.zeros(1, 3, *self.config.image_size, device=device).to(DTYPES[precision])
        fold_batch_norms(self.model, lambda: self.model.encode_image(blank))  # type: ignore[operator]
        self._cores = Cores()
        self._text_cores = Cores()  # of its own: a query does not queue behind a batch of pictures
        self._tokenizer = tokenizer
        # Hugging Face's fast tokenizers raise "Already borrowed" when two threads share one.
        self._tokenizer_lock = threading.Lock()
        self._model_cfg = deepcopy(dict(model_cfg))
        self._preprocess_cfg = deepcopy(dict(preprocess_cfg))
        scale = 1.0 / (255.0 * torch.tensor(self.config.std))
        shift = -torch.tensor(self.config.mean) / torch.tensor(self.config.std)
        self._scale = scale.view(1, 3, 1, 1).to(device)
        self._shift = shift.view(1, 3, 1, 1).to(device)

    @property
    def known_id(self) -> str:
        """The `encoder_id`; with `towers`, what makes a loaded model a `lazy_encoder.Encoder`."""
        return self.encoder_id

    def towers(self) -> DualEncoder:
        """Return self: these towers are loaded."""
        return self

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""
        return self.config.dim

    @property
    def preferred_side(self) -> int:
        """Return the longer side, in pixels, that pictures are resized to; decoders may stop there."""
        return max(self.config.image_size)

    @property
    def preferred_batch(self) -> int:
        """Return a batch size that fills the device and still lets progress be reported."""
        most = 256
        return most if self.device.type != "cpu" else min(2 * PART * torch.get_num_threads(), most)

    @property
    def logit_scale(self) -> float:
        """Return the factor of cosines before a softmax: exp of the learned parameter, or 100."""
        scale: Any = getattr(self.model, "logit_scale", None)
        return 100.0 if scale is None else float(scale.detach().float().exp())

    def describe(self) -> str:
        """Return the encoder's settings as JSON, to be stored with its vectors."""
        return json.dumps(asdict(self.config))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Resize an RGB picture of any size to uint8 (3, H, W), as the image tower sees it.

        The geometry is that of OpenCLIP's inference transform: resize mode "shortest" (then centre
        crop), "longest" (then pad) or "squash", with antialiasing. Threads may call it.
        """
        if self.config.resize_mode == "shortest":
            image = _without_far_ends(image)
        pixels = torch.from_numpy(rgb_array(image))  # (H, W, 3)
        pixels = pixels.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), channels last in memory
        size = self._resized_shape(*pixels.shape[2:])
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode=self.config.interpolation, antialias=True)
        height, width = self.config.image_size
        return _centre_crop_or_pad(pixels, height, width, self.config.fill)[0].contiguous()

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        target_h, target_w = self.config.image_size
        if self.config.resize_mode == "squash":
            return target_h, target_w
        ratios = (height / target_h, width / target_w)
        if self.config.resize_mode == "longest":
            ratio = max(ratios)
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        if target_h == target_w:  # torchvision's Resize(int): the longer side is cut, not rounded
            short, long = min(height, width), max(height, width)
            longer = int(target_h * long / short)
            return (target_h, longer) if height <= width else (longer, target_h)
        ratio = min(ratios)
        return round(height / ratio), round(width / ratio)

    def encode_images(
        self,
        images: Sequence[Image.Image] | Sequence[torch.Tensor] | torch.Tensor,
        *,
        batch_size: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Encode pictures as float32 (N, D), unit rows.

        images: RGB pictures of any size, or the results of `preprocess`, uint8 tensors (3, H, W),
            listed or stacked. Without pictures the result has shape (0, D).
        Raises InputError for tensors of another shape or dtype.
        """
        size = batch_size or self.preferred_batch
        chunks = (images[start : start + size] for start in range(0, len(images), size))
        encode = torch.inference_mode()(self.image_features)
        return self._unit_rows(self.spread(encode, self._stack(chunk)) for chunk in chunks)

    def spread(
        self, work: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        """Run row-wise `work` on a batch (N, ...) without gradients; on a CPU, one chunk per core."""
        if self.device.type == "cpu":
            return self._cores.map(work, batch)
        with torch.no_grad():
            return work(batch)

    def _stack(self, images: Iterable[Image.Image | torch.Tensor]) -> torch.Tensor:
        rows = [i if isinstance(i, torch.Tensor) else self.preprocess(i) for i in images]
        batch = torch.stack(rows)
        expected = (3, *self.config.image_size)
        if batch.dtype != torch.uint8 or batch.shape[1:] != expected:
            raise InputError(
                f"preprocessed pictures must be uint8 of shape {expected}, "
                f"got {batch.dtype} {tuple(batch.shape[1:])}; use DualEncoder.preprocess"
            )
        return batch

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (N, 3, H, W) as (N, D), not normalised, with gradients if enabled."""
        # No other place applies the checkpoint's mean and std: x / (255 std) - mean / std.
        pixels = pixels.to(self.device, non_blocking=True).float()
        pixels = torch.addcmul(self._shift, pixels, self._scale)
        dtype = next(self.model.visual.parameters()).dtype  # type: ignore[union-attr]
        pixels = pixels.to(dtype, memory_format=torch.channels_last)
        features: torch.Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return features

    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int = 256
    ) -> npt.NDArray[np.float32]:
        """Encode texts as float32 (N, D), unit rows; without texts the shape is (0, D).

        A text longer than the context length is cut; its end-of-text token stays.
        Raises InputError for a string in place of a list, ModelError if the text tower is untrained.
        """
        if isinstance(texts, str):
            raise InputError(f"encode_texts takes a list of texts, got the string {texts!r}")
        if "text" in self.untrained:
            raise ModelError(
                f"the text tower of {self.spec} is untrained, so words would find nothing; search by "
                "an example picture, or train the model on captions"
            )
        starts = range(0, len(texts), batch_size)
        return self._unit_rows(self._encode_texts(texts[s : s + batch_size]) for s in starts)

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenize(texts)
        encode = torch.inference_mode()(self.text_features)
        if self.device.type == "cpu" and len(texts) <= PART:
            return self._text_cores.run_alone(encode, tokens)
        return encode(tokens)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokenize texts: int64 (N, context length). Threads may call it."""
        with self._tokenizer_lock:
            tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode tokens, int64 (N, L), as (N, D), not normalised, with gradients if enabled.

        OpenCLIP's encode_text, without the work on padding where it cannot change the result.
        """
        tokens = tokens.to(self.device, non_blocking=True)
        text = getattr(self.model, "text", self.model)
        if (pad := getattr(getattr(text, "config", None), "pad_token_id", None)) is not None:
            # A Hugging Face tower masks padding: columns that hold nothing else can go.
            used = int((tokens != pad).sum(dim=1).max())
            if bool((tokens[:, used:] == pad).all()):
                tokens = tokens[:, : max(used, 1)]
        elif is_causal_argmax(text):
            # What follows the end-of-text token cannot reach it through a causal mask.
            end = tokens.argmax(dim=-1)
            return causal_text_features(text, tokens[:, : int(end.max()) + 1], end)
        features: torch.Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return features

    def _unit_rows(self, features: Iterable[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Normalise and concatenate batches, in float32 whatever the towers' precision is."""
        rows = [F.normalize(batch.float(), dim=-1).cpu().numpy() for batch in features]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    @property
    def tokenizer(self) -> Any:
        """Return OpenCLIP's tokenizer; `tokenize` guards it against two threads at once."""
        return self._tokenizer

    def settings(self) -> dict[str, Any]:
        """Return what a checkpoint folder's CONFIG_FILE holds: model_cfg and preprocess_cfg."""
        return {"model_cfg": self._model_cfg, "preprocess_cfg": self._preprocess_cfg}

    def save(self, folder: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write an OpenCLIP checkpoint folder (see `clipkit.checkpoint`), weights in float32.

        OpenCLIP opens it as `local-dir:FOLDER`, `load` by its path; both give these embeddings.
        Raises InputError if the weights were rounded to half precision when they were loaded.
        """
        from safetensors.torch import save_file

        if self.precision != "float32":
            raise InputError(
                f"cannot save {self.spec}: its weights were rounded to {self.precision}; "
                "load it with precision='float32'"
            )

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            # Tied weights are written once each; safetensors refuses shared memory.
            name: (t.float() if t.is_floating_point() else t).cpu().contiguous().clone()
            for name, t in self.model.state_dict().items()
        }
        save_file(tensors, folder / checkpoint.WEIGHTS_FILE, metadata={"format": "pt"})
        write_settings(folder, self.model, self._tokenizer, self._model_cfg, self._preprocess_cfg)
        identity = checkpoint.identify(str(folder))
        assert identity is not None
        random = {"untrained": sorted(self.untrained)} if self.untrained else {}
        note = {**identity._asdict(), **random, **(provenance or {})}
        write_json(folder / checkpoint.PROVENANCE_FILE, note)


def write_settings(
    folder: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
) -> None:
    """Write all files of a checkpoint folder except the weights."""
    write_config(folder, model_cfg, preprocess_cfg)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    transformer = getattr(getattr(model, "text", None), "transformer", None)
    if (settings := getattr(transformer, "config", None)) is not None:
        settings.save_pretrained(folder)


def write_config(
    folder: Path, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder's open_clip_config.json."""
    content = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    write_json(folder / checkpoint.CONFIG_FILE, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as those of a checkpoint are: indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_far_ends(image: Image.Image, most: int = 16) -> Image.Image:
    """Cut a long strip to `most` times its shorter side; the centre crop would drop the rest anyway.

    Otherwise a 10,000 x 1 picture would be resized to 2,240,000 x 224 pixels first.
    """
    width, height = image.size
    keep_w, keep_h = min(width, most * height), min(height, most * width)
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    return image.crop((left, top, left + keep_w, top + keep_h))


def _centre_crop_or_pad(pixels: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Crop or pad as torchvision's CenterCrop and OpenCLIP's CenterCropOrPad do, to the pixel."""
    have_h, have_w = pixels.shape[2:]
    if have_h < height or have_w < width:
        missing_h, missing_w = max(height - have_h, 0), max(width - have_w, 0)
        left, top = missing_w // 2, missing_h // 2
        pixels = F.pad(pixels, (left, missing_w - left, top, missing_h - top), value=fill)
        have_h, have_w = pixels.shape[2:]
    top, left = round((have_h - height) / 2.0), round((have_w - width) / 2.0)
    return pixels[:, :, top : top + height, left : left + width]


def is_causal_argmax(text: torch.nn.Module) -> bool:
    """Return whether this is CLIP's text tower: causal, read at the end-of-text token."""
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    return (
        pool == "argmax"
        and getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
    )


def causal_text_features(
    text: torch.nn.Module, tokens: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """Encode tokens (N, L), cut behind their last end (N,), as (N, D): open_clip's CLIP.encode_text."""
    part: Any = text
    dtype = part.transformer.get_cast_dtype()
    length = tokens.shape[1]
    x = part.token_embedding(tokens).to(dtype) + part.positional_embedding[:length].to(dtype)
    x = part.transformer(x, attn_mask=part.attn_mask[:length, :length])
    x = part.ln_final(x)[torch.arange(tokens.shape[0], device=tokens.device), end]
    projection = part.text_projection
    if projection is None:
        return x  # type: ignore[no-any-return]
    if isinstance(projection, torch.nn.Linear):
        return projection(x)  # type: ignore[no-any-return]
    return x @ projection  # type: ignore[no-any-return]


class Cores:
    """Encode parts of a batch on a CPU's cores side by side, one torch thread each.

    Threads that share each operation wait for each other after it, and idle while one of them decodes
    a picture. A part that a core has for itself also stays in its cache: on two cores 1.4 times the
    pictures a second for a convolutional tower, and no loss for a transformer.
    """

    def map(
        self, work: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        """Apply row-wise `work` to chunks of `batch` in parallel; return the results concatenated.

        Gradients are not recorded, since torch keeps that setting per thread. An exception in `work`
        is raised here.
        """
        if len(batch) <= PART or torch.get_num_threads() == 1:
            with torch.no_grad():
                return work(batch)
        parts = self._pool.map(torch.no_grad()(work), torch.split(batch, PART))
        return torch.cat(list(parts))

    def run_alone(
        self, work: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        """Apply `work` to a few rows with one torch thread, and return or raise what it does.

        Two threads share each small operation and wait for each other after it: with other work on
        two cores a query took 28 to 35 ms (p95 50) on one thread, 140 to 210 (p95 800 to 1,000) on
        two. On idle cores it takes 9 ms instead of 7.
        """
        if torch.get_num_threads() == 1:
            return work(batch)
        return self._pool.submit(work, batch).result()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Start as many threads as torch uses, when they are first needed."""
        count = torch.get_num_threads()
        return ThreadPoolExecutor(
            count, "core", initializer=use_one_torch_thread, initargs=(count,)
        )


def use_one_torch_thread(common: int) -> None:
    """Let this thread compute with one torch thread, and threads started later with `common`.

    torch keeps one number per thread, taken from a common one at the thread's first operation, and
    `set_num_threads` sets both. So this thread takes and sets its own first; another one then
    restores the common number.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(common,))
    restore.start()
    restore.join()
