"""Read an OpenCLIP checkpoint folder without torch: its layout, its settings, its identity.

    open_clip_config.json         {"model_cfg": {...}, "preprocess_cfg": {...}}, OpenCLIP's own
    open_clip_model.safetensors   the weights
    tokenizer.json, ...           Hugging Face tokenizer files, if the text tower uses one
    config.json                   the Hugging Face text transformer's settings, if there is one
    clipkit.json                  provenance: where the checkpoint comes from and what was measured
    onnx/                         the same towers exported, if `clipkit export` wrote them: see `Export`

OpenCLIP itself opens such a folder as `local-dir:FOLDER`. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from clipkit.durable import write_whole
from clipkit.errors import ModelError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
PROVENANCE_FILE = "clipkit.json"
TEXT_CONFIG_FILE = "config.json"
EXPORT_FILE = "export.json"  # makes a folder an exported one
EXPORT_FOLDER = "onnx"  # of a checkpoint
RUN_RESULT = "checkpoint"  # in the folder of a training run
WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# These files decide how a text becomes tokens; the first that exists is hashed.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# Keys about how a model was loaded, not about what the towers compute.
_VOLATILE_KEYS = frozenset({"timm_model_pretrained", "hf_model_pretrained"})
# TowerConfig's fields that say how a picture is prepared.
_IMAGE_SETTINGS = ("image_size", "mean", "std", "interpolation", "resize_mode", "fill")
# Every OpenCLIP model, CoCa and timm's towers included, encodes a picture by its module `visual` alone.
_IMAGE_WEIGHTS = "visual."
_REMEMBER_SECONDS = 0.02  # a digest that takes longer is stored in the user's cache
_SETTLED_NS = 2 * 10**9  # a file written later may change again within its time stamp


class Identity(NamedTuple):
    """What a model's vectors are, each sixteen hex digits.

    `space_id` depends on the picture side alone: models that share it give a picture the same vector,
    whatever their text towers are. `encoder_id` depends on both sides.
    """

    encoder_id: str
    space_id: str


class WeightsDigest(NamedTuple):
    """SHA-256 of all weights and of the image tower's, hexadecimal."""

    model: str
    image: str


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """The settings of an encoder: how it takes a picture and a text.

    `image_size` is (height, width) in pixels; `mean` and `std` are per channel, in [0, 1] units;
    `fill` is the grey level that pads a picture in resize mode "longest".
    """

    architecture: str
    dim: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill: int
    context_length: int
    activation: Literal["gelu", "quick_gelu"]

    @classmethod
    def from_open_clip(
        cls, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]
    ) -> TowerConfig:
        """Read OpenCLIP's two dictionaries, with OpenCLIP's defaults for missing keys."""
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        size = preprocess_cfg.get("size") or vision.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        interpolation = preprocess_cfg.get("interpolation") or "bicubic"
        return cls(
            architecture=" + ".join((_image_tower_name(vision), _text_tower_name(text))),
            dim=int(model_cfg["embed_dim"]),
            image_size=(int(height), int(width)),
            # CLIP's own statistics: github.com/openai/CLIP, clip.py
            mean=_triple(preprocess_cfg.get("mean") or (0.48145466, 0.4578275, 0.40821073)),
            std=_triple(preprocess_cfg.get("std") or (0.26862954, 0.26130258, 0.27577711)),
            # As OpenCLIP at inference: whatever is not "bilinear" is bicubic.
            interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
            resize_mode=preprocess_cfg.get("resize_mode") or "shortest",
            fill=int(preprocess_cfg.get("fill_color") or 0),
            context_length=int(text.get("context_length", 77)),
            activation="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        )


def _image_tower_name(vision: Mapping[str, Any]) -> str:
    if "timm_model_name" in vision:
        return str(vision["timm_model_name"])
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if isinstance(layers, list):
        return f"resnet {layers}"
    return f"vit {layers}x{width}/{vision.get('patch_size', 16)}"


def _text_tower_name(text: Mapping[str, Any]) -> str:
    if "hf_model_name" in text:
        return str(text["hf_model_name"]).rsplit("/", 1)[-1]
    return f"transformer {text.get('layers', 12)}x{text.get('width', 512)}"


def _triple(values: float | Iterable[float]) -> tuple[float, float, float]:
    listed = [float(values)] * 3 if isinstance(values, (int, float)) else [float(v) for v in values]
    return cast(tuple[float, float, float], tuple(listed))


def find_folder(spec: str) -> Path | None:
    """Return the folder that a spec names, or None if it names a model of a hub, or nothing.

    The folder of a training run stands for its final checkpoint, a file of weights for the folder that
    it was converted to (None before that).
    """
    if spec == "builtin":
        return Path(__file__).parent / "builtin"
    folder = _path(spec)
    result = folder / RUN_RESULT
    if (result / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists():
        return result
    if folder.is_dir():
        return folder
    if named := weights_file(spec):
        converted = converted_folder(*named)
        return converted if (converted / CONFIG_FILE).is_file() else None
    return None


def absolute(spec: str) -> str:
    """Return a spec that names the same model from any working folder: paths are made absolute."""
    if spec == "builtin":
        return spec
    if _path(spec).is_dir():
        return os.path.abspath(_path(spec))
    if named := weights_file(spec):
        architecture, file = named
        return f"{architecture}:{os.path.abspath(file)}"
    return spec


def weights_file(spec: str) -> tuple[str, Path] | None:
    """Return the architecture and the file that ARCHITECTURE:FILE (or ARCHITECTURE/FILE) names.

    None if the spec has another form or there is no such file.
    """
    named = re.fullmatch(r"([^/:]+)[:/](.+)", spec)
    if named is None or not spec.endswith(WEIGHTS_SUFFIXES):
        return None
    # OpenCLIP's users write ARCHITECTURE//FILE for any file.
    files = (Path(named[2]).expanduser(), Path(named[2].lstrip("/")))
    return next(((named[1], file) for file in files if file.is_file()), None)


def converted_folder(architecture: str, file: Path) -> Path:
    """Return the folder in the user's cache that this content of a file of weights is converted to."""
    from platformdirs import user_cache_path

    facts = file.stat()
    digest = _file_digest(os.path.abspath(file), facts.st_size, facts.st_mtime_ns)
    return user_cache_path("clipkit") / "models" / f"{architecture}-{digest[:16]}"


@lru_cache
def _file_digest(path: str, _size: int, _mtime_ns: int) -> str:
    return sha256(Path(path))


def _path(spec: str) -> Path:
    return Path(spec.removeprefix("local-dir:")).expanduser()


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the folder's model_cfg and preprocess_cfg. Raises ModelError if it has none."""
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["model_cfg"], content.get("preprocess_cfg", {})
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a checkpoint: it holds no {CONFIG_FILE}; "
            "give an OpenCLIP folder, `builtin`, `hf-hub:ORG/NAME` or `ARCHITECTURE/TAG`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not an OpenCLIP config ({type(error).__name__}: {error}); "
            "it should be JSON with a key `model_cfg`"
        ) from error


def untrained(folder: Path) -> frozenset[str]:
    """Return the towers, "image" and "text", whose weights are random by the folder's provenance."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        note = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        return frozenset(note.get("untrained", ())) & {"image", "text"}
    return frozenset()


def identify(spec: str) -> Identity | None:
    """Return the identity of a safetensors checkpoint folder; None if only loading tells it.

    For an exported folder see `Export`. It imports no torch and reads a file's weights once, so that
    an unchanged library is recognised at once: digests are stored in the user's cache by the file's
    path, size and times.
    """
    folder = find_folder(spec)
    if folder is not None and (folder / EXPORT_FILE).is_file():
        return _identify_export(folder)
    if folder is None or not (folder / WEIGHTS_FILE).is_file():
        return None
    model_cfg, preprocess_cfg = read_config(folder)
    weights = _remembered(folder / WEIGHTS_FILE, lambda path: weights_digest(read_weights(path)))
    return combine_identity(
        model_cfg, preprocess_cfg, tokenizer_digest(folder), WeightsDigest(*weights)
    )


def combine_identity(
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tokenizer: str,
    weights: WeightsDigest,
) -> Identity:
    """Return what depends on everything that affects an embedding, and no more."""
    resolved = TowerConfig.from_open_clip(model_cfg, preprocess_cfg)
    image = [getattr(resolved, name) for name in _IMAGE_SETTINGS]
    settings = {
        "model": _without_volatile(model_cfg),
        "image": image,
        "tokenizer": tokenizer,
        "weights": weights.model,
    }
    vision = model_cfg["vision_cfg"]
    space = {
        "vision": _without_volatile(vision),
        "dim": resolved.dim,
        # Of the image towers, only OpenCLIP's own ViT takes its activation from the model's settings.
        "activation": None if "timm_model_name" in vision else resolved.activation,
        "image": image,
        "weights": weights.image,
    }
    return Identity(_hash(settings), _hash(space))


def _hash(settings: Mapping[str, Any]) -> str:
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_volatile(v) for k, v in value.items() if k not in _VOLATILE_KEYS}
    return value


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """The manifest of an exported folder, EXPORT_FILE: the towers of a model for other runtimes.

        export.json               this
        image.onnx                uint8 pixels (N, 3, H, W) -> float32 unit rows (N, D)
        text.onnx                 int64 tokens (N, L) -> float32 unit rows (N, D)
        tokenizer.json            texts -> tokens, as the library `tokenizers` reads it
        open_clip_config.json     the model's settings, as in its checkpoint
        strength.json             its calibration, if it has one that holds for the export
        report.json, README.md    what was measured, and how to use the files without clipkit

    `image` and `text` say how to use a tower: its file, its input's name, dtype and shape, its
    precision ("float32" or "int8"). `files` are the SHA-256 of all files that decide a vector.

    Identity: a tower in float32 is the model's own, so the export carries its ids. One in int8 gives
    other vectors: its ids are hashed from the model's and the file's. So an int8 text tower beside a
    float32 image tower has the model's `space_id` and an `encoder_id` of its own.
    """

    model: str  # the spec that was exported
    source: Identity
    dim: int
    logit_scale: float
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    files: Mapping[str, str]
    clipkit: str  # the version that wrote it

    def identity(self) -> Identity:
        """Return the identity of the export's vectors."""
        changed = {
            side: self.files[tower["file"]]
            for side, tower in (("image", self.image), ("text", self.text))
            if tower["precision"] != "float32"
        }
        encoder_id, space_id = self.source
        if changed:
            encoder_id = _hash({"exported": encoder_id, **changed})
        if "image" in changed:
            space_id = _hash({"exported": space_id, "image": changed["image"]})
        return Identity(encoder_id, space_id)

    def write(self, folder: Path) -> None:
        """Write EXPORT_FILE into `folder`, all or nothing."""
        content = {**asdict(self), "source": self.source._asdict()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / EXPORT_FILE, text.encode("utf-8"))


def find_export(spec: str) -> Path | None:
    """Return the exported folder that a spec names, or that lies in the checkpoint it names."""
    folder = find_folder(spec)
    places = () if folder is None else (folder, folder / EXPORT_FOLDER)
    return next((place for place in places if (place / EXPORT_FILE).is_file()), None)


def is_export(spec: str) -> bool:
    """Return whether a spec names an exported folder itself."""
    folder = find_folder(spec)
    return folder is not None and (folder / EXPORT_FILE).is_file()


def not_for_torch(spec: str) -> str:
    """Return the message for an exported folder where torch's towers are needed, as for training."""
    folder = find_folder(spec)
    assert folder is not None
    model = read_export(folder).model
    return f"{spec} holds exported towers, which torch cannot run or train; name the model: {model}"


def read_export(folder: Path) -> Export:
    """Read an exported folder's manifest. Raises ModelError if it is none."""
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Export(**{**content, "source": Identity(**content["source"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not the manifest of an export ({type(error).__name__}: {error}); "
            "export the model again: clipkit export MODEL --onnx"
        ) from error


def _identify_export(folder: Path) -> Identity:
    """Return the identity of an exported folder; raises ModelError if a file is another one now."""
    export = read_export(folder)
    for name, expected in export.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder} lacks {name}; export the model again")
        if _remembered(path, lambda path: (sha256(path),))[0] != expected:
            raise ModelError(
                f"{path} is not the file that was exported (its SHA-256 differs); "
                f"export the model again: clipkit export {export.model} --onnx --out {folder}"
            )
    return export.identity()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Return a digest of the tokenizer; empty for OpenCLIP's own, which the config describes."""
    paths = (folder / name for name in TOKENIZER_FILES)
    path = next((path for path in paths if path.is_file()), None)
    return "" if path is None else _remembered(path, lambda path: (_tokenizer_digest(path),))[0]


def _tokenizer_digest(path: Path) -> str:
    if path.name != "tokenizer.json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.loads(path.read_text(encoding="utf-8"))
    # Saved, but not part of encoding: the last caller's padding and truncation, and the decoder
    # from tokens to text, which transformers adds when it saves.
    for other in ("padding", "truncation", "decoder"):
        content.pop(other, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remembered(path: Path, digest: Callable[[Path], tuple[str, ...]]) -> tuple[str, ...]:
    """Return `digest(path)`, from the user's cache if the file is the one that was digested before.

    That it is the same is seen by path, size, inode and times. Only what took long is stored.
    """
    from platformdirs import user_cache_path

    def facts() -> list[Any]:
        found = path.stat()
        return [1, place, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]

    place = os.path.abspath(path)
    before = facts()
    name = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
    stored = user_cache_path("clipkit") / "digests" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(stored.read_bytes())
        if content["file"] == before:
            return tuple(map(str, content["digests"]))
    started = time.monotonic()
    digests = digest(path)
    settled = time.time_ns() - max(before[-2:]) > _SETTLED_NS and facts() == before
    if settled and time.monotonic() - started > _REMEMBER_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time
            stored.parent.mkdir(parents=True, exist_ok=True)
            content = {"file": before, "digests": digests}
            write_whole(stored, json.dumps(content).encode(), sync=False)
    return digests


def weights_digest(tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> WeightsDigest:
    """Return digests of named arrays, which come in the order of their names.

    Half-precision values are hashed as float32, so that the same values stored as either are the
    same encoder. bfloat16, which numpy lacks, is already widened to float32.
    """
    model, image = hashlib.sha256(), hashlib.sha256()
    for name, array in tensors:
        wide = array.astype(np.float32) if array.dtype == np.float16 else array
        for digest in (model, image) if name.startswith(_IMAGE_WEIGHTS) else (model,):
            digest.update(f"{name}:{wide.dtype}:{list(wide.shape)};".encode())
            digest.update(np.ascontiguousarray(wide).data)
    return WeightsDigest(model.hexdigest(), image.hexdigest())


_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def count_values(path: Path) -> int:
    """Return how many numbers a safetensors file holds: about its model's number of parameters.

    Only the header is read. Raises ModelError if it is damaged.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return sum(math.prod(entry["shape"]) for entry in header.values())
    except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise _damaged(path, error) from error


def read_weights(
    path: Path, prefixes: str | tuple[str, ...] = ""
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the tensors of a safetensors file whose names begin with `prefixes`, ordered by name.

    bfloat16 is widened to float32. Raises ModelError if the file is damaged.

    The format (https://huggingface.co/docs/safetensors): a little-endian u64 header length, a JSON
    header of name -> dtype, shape, offsets, then the bytes. Read here because the library's numpy
    reader refuses bfloat16.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            for name in sorted(name for name in header if name.startswith(prefixes)):
                entry = header[name]
                begin, end = entry["data_offsets"]
                raw = data[start + begin : start + end]
                if entry["dtype"] == "BF16":
                    values = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
                    array = values.view(np.float32)
                else:
                    array = np.frombuffer(raw, _SAFETENSORS_DTYPES[entry["dtype"]])
                yield name, array.reshape(entry["shape"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} is not a whole safetensors file ({type(error).__name__}: {error}); copy it again"
    )
