"""The dual encoder: an image tower and a text tower that share one embedding space.

The only module that knows OpenCLIP. A model is named by a spec:

    builtin                            ships inside clipkit; needs no network
    ViT-B-32/laion2b_s34b_b79k         an OpenCLIP architecture and pretrained tag
    hf-hub:timm/ViT-B-16-SigLIP        an OpenCLIP repository on the Hugging Face hub
    path/to/folder                     an OpenCLIP checkpoint folder, such as `save` writes

Architectures, weights and tokenizers are OpenCLIP's. What is done here, and why: pictures are
resized as uint8 in the decode workers (an antialiased resize in torch, several times faster than
PIL's and equal to it within a rounding step); texts are cut behind their last token where that
leaves the embedding the same; vectors leave as float32 unit rows, normalised once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
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

__all__ = ["DualEncoder", "Precision", "choose_device", "choose_precision", "load"]

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DualEncoder:
    """Pictures and texts to unit vectors of one space. Made by `load`; threads may share it."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        spec: str,
        encoder_id: str,
        model_cfg: Mapping[str, Any],
        preprocess_cfg: Mapping[str, Any],
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.spec = spec
        self.encoder_id = encoder_id
        self.config = TowerConfig.from_open_clip(model_cfg, preprocess_cfg)
        self.device = device
        self.precision = precision
        self.model = model.eval().requires_grad_(False).to(device, _DTYPES[precision])
        # Convolutions run 1.5 to 3 times faster with the channels last; transformers do not mind.
        self.model = self.model.to(memory_format=torch.channels_last)
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
    def dim(self) -> int:
        """The length of an embedding."""
        return self.config.dim

    @property
    def preferred_side(self) -> int:
        """The side in pixels that pictures are resized to: a decoder need not give much more."""
        return max(self.config.image_size)

    @property
    def preferred_batch(self) -> int:
        """Pictures a batch: enough to fill the device, small enough to report progress on."""
        return 16 if self.device.type == "cpu" else 256

    def describe(self) -> str:
        """The encoder's settings as JSON, to be kept beside its vectors."""
        return json.dumps(asdict(self.config))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """An RGB picture of any size -> uint8 (3, H, W) as the image tower sees it.

        The geometry is that of OpenCLIP's inference transform: resize mode "shortest" (then centre
        crop), "longest" (then pad) or "squash", with antialiasing. Safe to call in threads.
        """
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (H, W, 3)
        pixels = pixels.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), channels last in memory
        height, width = self.config.image_size
        resized = self._resize(pixels, *self._resized_shape(pixels.shape[2], pixels.shape[3]))
        return _centre_crop_or_pad(resized, height, width, self.config.fill)[0].contiguous()

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

    def _resize(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if pixels.shape[2:] == (height, width):
            return pixels
        return F.interpolate(
            pixels, size=(height, width), mode=self.config.interpolation, antialias=True
        )

    def encode_images(
        self,
        images: Sequence[Image.Image] | Sequence[torch.Tensor] | torch.Tensor,
        *,
        batch_size: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Pictures -> float32 (N, D), unit rows.

        `images` are RGB pictures of any size, or what `preprocess` gave for each: uint8 tensors
        (3, H, W), listed or stacked. No pictures give shape (0, D).
        """
        size = batch_size or self.preferred_batch
        chunks = (images[start : start + size] for start in range(0, len(images), size))
        return self._gather(self._encode_image_batch(self._stack(chunk)) for chunk in chunks)

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

    @torch.inference_mode()
    def _encode_image_batch(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = batch.to(self.device, non_blocking=True).float()
        pixels = torch.addcmul(self._shift, pixels, self._scale)
        pixels = pixels.to(_DTYPES[self.precision], memory_format=torch.channels_last)
        features: torch.Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return features

    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int = 256
    ) -> npt.NDArray[np.float32]:
        """Texts -> float32 (N, D), unit rows. A text beyond the context length is cut, its
        end-of-text token kept. No texts give shape (0, D)."""
        if isinstance(texts, str):
            raise InputError(f"encode_texts takes a list of texts, got the string {texts!r}")
        starts = range(0, len(texts), batch_size)
        return self._gather(self._encode_text_batch(texts[s : s + batch_size]) for s in starts)

    @torch.inference_mode()
    def _encode_text_batch(self, texts: Sequence[str]) -> torch.Tensor:
        with self._tokenizer_lock:
            tokens: torch.Tensor = self._tokenizer(list(texts))  # int64 (N, context_length)
        return self._text_features(tokens.to(self.device))

    def _text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """OpenCLIP's encode_text, without the work on padding where it cannot change the result."""
        text = getattr(self.model, "text", self.model)
        if (pad := getattr(getattr(text, "config", None), "pad_token_id", None)) is not None:
            # A Hugging Face tower masks padding: columns that hold nothing else can go.
            used = int((tokens != pad).sum(dim=1).max())
            if bool((tokens[:, used:] == pad).all()):
                tokens = tokens[:, : max(used, 1)]
        elif _is_causal_argmax(text):
            # What follows the end-of-text token cannot reach it through a causal mask.
            end = tokens.argmax(dim=-1)
            return _causal_text_features(text, tokens[:, : int(end.max()) + 1], end)
        features: torch.Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return features

    def _gather(self, features: Iterable[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Normalise, in float32 whatever the towers' precision: the only place that does."""
        rows = [F.normalize(batch.float(), dim=-1).cpu().numpy() for batch in features]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    def save(self, folder: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write an OpenCLIP checkpoint folder (see `clipkit.checkpoint`), weights in float32.

        OpenCLIP opens it as `local-dir:FOLDER`, `load` by its path; both give these embeddings.
        """
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            # Tied weights are written once each; safetensors refuses shared memory.
            name: tensor.detach().cpu().float().contiguous().clone()
            if tensor.is_floating_point()
            else tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.model.state_dict().items()
        }
        save_file(tensors, folder / checkpoint.WEIGHTS_FILE, metadata={"format": "pt"})
        _write_settings(folder, self.model, self._tokenizer, self._model_cfg, self._preprocess_cfg)
        note = {"encoder_id": checkpoint.identify(str(folder)), **(provenance or {})}
        _write_json(folder / checkpoint.PROVENANCE_FILE, note)


def load(spec: str, *, device: str = "auto", precision: Precision = "auto") -> DualEncoder:
    """Load the towers that `spec` names (see the module's docstring).

    device: "auto" (a CUDA GPU, else Apple's MPS, else the CPU) or any torch device.
    precision: "auto" (bfloat16 where the device computes in it, else float32) or a dtype's name.
    Raises ModelError, in one sentence, for a spec that is unknown or cannot be fetched.
    """
    import open_clip

    chosen_device = choose_device(device)
    chosen_precision = choose_precision(chosen_device, precision)
    folder = checkpoint.find_folder(spec)
    with _quiet_open_clip():
        if folder is None and spec.startswith("hf-hub:"):
            folder = _snapshot(spec)
        if folder is not None:
            model_cfg, preprocess_cfg = checkpoint.read_config(folder)
            name, build = f"local-dir:{folder}", _folder_builder(folder, model_cfg)
        else:
            name, model_cfg, preprocess_cfg, build = _pretrained_builder(spec)
        try:
            model = build()
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # OpenCLIP and the hub raise whatever they like
            raise ModelError(_unreachable(spec, error)) from error
        # OpenCLIP resolves what the config leaves open (size, defaults) and keeps it on the model.
        preprocess_cfg = {**preprocess_cfg, **getattr(model.visual, "preprocess_cfg", {})}
        encoder_id = checkpoint.identify(str(folder)) if folder is not None else None
        if encoder_id is None:
            encoder_id = _identify_loaded(model, tokenizer, model_cfg, preprocess_cfg)
    return DualEncoder(
        model,
        tokenizer,
        spec=spec,
        encoder_id=encoder_id,
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg,
        device=chosen_device,
        precision=chosen_precision,
    )


def choose_device(device: str = "auto") -> torch.device:
    """The device to compute on; "auto" prefers CUDA, then MPS, then the CPU."""
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"device {device!r} is not usable here ({reason}); use auto, cpu, cuda or mps"
            ) from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, precision: str = "auto") -> Precision:
    """The dtype of the weights; "auto" takes bfloat16 only where the hardware multiplies in it."""
    if precision in _DTYPES:
        return precision  # type: ignore[return-value]
    if precision != "auto":
        choices = ", ".join(("auto", *_DTYPES))
        raise InputError(f"precision {precision!r} is unknown; use one of {choices}")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()  # emulated bfloat16 is eight times slower than float32
        return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    return "float32"


def _folder_builder(folder: Path, model_cfg: Mapping[str, Any]) -> Callable[[], torch.nn.Module]:
    import open_clip

    overrides = {}
    if (
        "hf_model_name" in model_cfg["text_cfg"]
        and (folder / checkpoint.TEXT_CONFIG_FILE).is_file()
    ):
        # The text transformer's settings lie beside the weights: no hub is asked for them.
        overrides["text_cfg"] = {
            **model_cfg["text_cfg"],
            "hf_model_name": str(folder.resolve()),
            "hf_model_pretrained": False,
        }

    def build() -> torch.nn.Module:
        model: torch.nn.Module = open_clip.create_model(
            f"local-dir:{folder}", require_pretrained=True, weights_only=True, **overrides
        )
        return model

    return build


def _pretrained_builder(
    spec: str,
) -> tuple[str, dict[str, Any], dict[str, Any], Callable[[], torch.nn.Module]]:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    architecture, _, tag = spec.rpartition("/")
    model_cfg = open_clip.get_model_config(architecture) if architecture else None
    if model_cfg is None:
        raise ModelError(_unknown_spec(spec, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ModelError(
            f"{architecture} has no pretrained tag {tag!r}; it has {', '.join(tags) or 'none'}"
        )
    # The activation is part of the weights' identity: OpenCLIP only warns when the two disagree.
    quick_gelu = bool(get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    model_cfg["quick_gelu"] = quick_gelu

    def build() -> torch.nn.Module:
        model: torch.nn.Module = open_clip.create_model(
            architecture,
            pretrained=tag,
            require_pretrained=True,
            weights_only=True,
            quick_gelu=quick_gelu,
        )
        return model

    return architecture, model_cfg, {}, build


def _snapshot(spec: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "*.model", "open_clip_*model.safetensors"]
        folder = Path(snapshot_download(spec.removeprefix("hf-hub:"), allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(
                    spec.removeprefix("hf-hub:"), allow_patterns=[*wanted, "open_clip_*model.bin"]
                )
            )
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository
        raise ModelError(_unreachable(spec, error)) from error
    return folder


def _unreachable(spec: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"model {spec!r} could not be loaded ({reason[:200]}); "
        "use --model builtin, which needs no network, or give the folder of a downloaded checkpoint"
    )


def _unknown_spec(spec: str, architectures: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(spec.partition("/")[0], architectures, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}/TAG?" if near else ""
    return (
        f"model {spec!r} is unknown{hint}: use builtin, ARCHITECTURE/TAG such as "
        "ViT-B-32/laion2b_s34b_b79k, hf-hub:ORG/NAME, or the folder of an OpenCLIP checkpoint"
    )


def _identify_loaded(
    model: torch.nn.Module,
    tokenizer: Any,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
) -> str:
    state = model.state_dict()
    tensors = (
        (n, (t.float() if t.is_floating_point() else t).numpy()) for n, t in sorted(state.items())
    )
    with tempfile.TemporaryDirectory() as scratch:
        _write_settings(Path(scratch), model, tokenizer, model_cfg, preprocess_cfg)
        tokens = checkpoint.tokenizer_digest(Path(scratch))
    return checkpoint.combine_identity(
        model_cfg, preprocess_cfg, tokens, checkpoint.weights_digest(tensors)
    )


def _write_settings(
    folder: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
) -> None:
    """Everything of a checkpoint folder but the weights."""
    _write_json(
        folder / checkpoint.CONFIG_FILE,
        {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)},
    )
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    transformer = getattr(getattr(model, "text", None), "transformer", None)
    if (settings := getattr(transformer, "config", None)) is not None:
        settings.save_pretrained(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _centre_crop_or_pad(pixels: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Torchvision's CenterCrop and OpenCLIP's CenterCropOrPad, to the pixel."""
    have_h, have_w = pixels.shape[2:]
    if have_h < height or have_w < width:
        missing_h, missing_w = max(height - have_h, 0), max(width - have_w, 0)
        left, top = missing_w // 2, missing_h // 2
        pixels = F.pad(pixels, (left, missing_w - left, top, missing_h - top), value=fill)
        have_h, have_w = pixels.shape[2:]
    top, left = round((have_h - height) / 2.0), round((have_w - width) / 2.0)
    return pixels[:, :, top : top + height, left : left + width]


def _is_causal_argmax(text: torch.nn.Module) -> bool:
    """Whether this is CLIP's text tower: causal, read at the end-of-text token, no class token."""
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    return (
        pool == "argmax"
        and getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
    )


def _causal_text_features(
    text: torch.nn.Module, tokens: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """CLIP.encode_text of open_clip/model.py, cut: tokens (N, L), end (N,) -> (N, D)."""
    part: Any = text
    dtype = part.transformer.get_cast_dtype()
    length = tokens.shape[1]
    x = part.token_embedding(tokens).to(dtype) + part.positional_embedding[:length].to(dtype)
    x = part.transformer(x, attn_mask=part.attn_mask[:length, :length])
    x = part.ln_final(x)[torch.arange(len(tokens), device=tokens.device), end]
    projection = part.text_projection
    if projection is None:
        return x  # type: ignore[no-any-return]
    if isinstance(projection, torch.nn.Linear):
        return projection(x)  # type: ignore[no-any-return]
    return x @ projection  # type: ignore[no-any-return]


@contextlib.contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Keep what OpenCLIP logs to the root logger away from the user; errors are raised anyway."""
    root = logging.getLogger()
    drop = _DropOpenClip()
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(drop)
    # Without any handler logging.warning() would install one that writes to stderr.
    silencer = None if handlers else logging.NullHandler()
    if silencer:
        root.addHandler(silencer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(drop)
        if silencer:
            root.removeHandler(silencer)


class _DropOpenClip(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname
