"""Load towers by spec: builtin, OpenCLIP architecture and tag or file, hub, folder, random start."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clipkit import checkpoint, models, scratch
from clipkit.durable import whole_folder
from clipkit.errors import InputError, ModelError
from clipkit.hub import asking_the_hub
from clipkit.towers.encoder import DTYPES, DualEncoder, Precision, write_config, write_settings


def load(spec: str, *, device: str = "auto", precision: Precision = "auto") -> DualEncoder:
    """Load the towers that `spec` names (see the package's docstring).

    device: "auto" (a CUDA GPU, else Apple's MPS, else the CPU) or any torch device.
    precision: "auto" (bfloat16 where the device computes in it, else float32) or a dtype's name, of the
    image tower and, except on a CPU, of the text tower. CLIPKIT_PRECISION overrides "auto".
    Raises ModelError, in one sentence, for a spec that is unknown or cannot be fetched.
    """
    import open_clip

    import clipkit.towers.resnets  # noqa: F401  registers them with timm

    chosen_device = choose_device(device)
    chosen_precision = choose_precision(chosen_device, precision)
    models.check(spec)
    if checkpoint.is_export(spec):
        raise ModelError(checkpoint.not_for_torch(spec))
    folder = checkpoint.find_folder(spec)
    if folder is None and (named := checkpoint.weights_file(spec)):
        folder = _converted(*named)
    start = scratch.parse(spec)
    untrained = (
        checkpoint.untrained(folder) if folder else frozenset(("image", "text") if start else ())
    )
    with contextlib.ExitStack() as context:
        context.enter_context(_quiet_open_clip())
        if folder is None:
            context.enter_context(asking_the_hub())
        if folder is None and spec.startswith("hf-hub:"):
            folder = _snapshot(spec)
        if folder is not None:
            model_cfg, preprocess_cfg = checkpoint.read_config(folder)
            name, options = f"local-dir:{folder}", _folder_options(folder, model_cfg)
        elif start is not None:
            made = context.enter_context(_random_start(*start))
            name, model_cfg, preprocess_cfg, options = made
        else:
            name, model_cfg, options = _pretrained(spec)
            preprocess_cfg = {}
        try:
            model = open_clip.create_model(
                name, require_pretrained=start is None, weights_only=True, **options
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # OpenCLIP and the hub raise whatever they like
            raise ModelError(_unreachable(spec, error)) from error
        # OpenCLIP resolves what the config leaves open (size, defaults) and keeps it on the model.
        preprocess_cfg = {**preprocess_cfg, **getattr(model.visual, "preprocess_cfg", {})}
        identity = checkpoint.identify(str(folder)) if folder is not None else None
        if identity is None:
            identity = _identify_loaded(model, tokenizer, model_cfg, preprocess_cfg)
    return DualEncoder(
        model,
        tokenizer,
        spec=spec,
        identity=identity,
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg,
        device=chosen_device,
        precision=chosen_precision,
        untrained=untrained,
    )


def choose_device(device: str = "auto") -> torch.device:
    """Return the device to compute on; "auto" prefers CUDA, then MPS, then the CPU.

    Raises InputError if torch does not know the device, or cannot use it here.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise InputError(
                f"device {device!r} is unknown; use auto, cpu, cuda, cuda:1 or mps"
            ) from None
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"device {device!r} is not usable here ({reason}); use auto or cpu"
            ) from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, precision: str = "auto") -> Precision:
    """Return the dtype of the weights; "auto" is bfloat16 only where the hardware multiplies in it.

    The environment variable CLIPKIT_PRECISION overrides "auto". Raises InputError for other names.
    """
    if precision == "auto":
        precision = os.environ.get("CLIPKIT_PRECISION") or "auto"
    if precision in DTYPES:
        return precision  # type: ignore[return-value]
    if precision != "auto":
        choices = ", ".join(("auto", *DTYPES))
        raise InputError(f"precision {precision!r} is unknown; use one of {choices}")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()  # emulated bfloat16 is eight times slower than float32
        return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    return "float32"


def _folder_options(folder: Path, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which OpenCLIP makes the model of a checkpoint folder."""
    text = model_cfg["text_cfg"]
    if "hf_model_name" not in text or not (folder / checkpoint.TEXT_CONFIG_FILE).is_file():
        return {}
    # The text transformer's settings are in the folder: the hub is not needed for them.
    local = {"hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}
    return {"text_cfg": {**text, **local}}


def _pretrained(spec: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the architecture, model_cfg and options with which OpenCLIP makes ARCHITECTURE/TAG."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    architecture, _, tag = spec.rpartition("/")
    model_cfg = open_clip.get_model_config(architecture)
    # The activation is part of the weights' identity: OpenCLIP only warns when the two disagree.
    quick_gelu = bool(get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    model_cfg["quick_gelu"] = quick_gelu
    return architecture, model_cfg, {"pretrained": tag, "quick_gelu": quick_gelu}


@contextlib.contextmanager
def _random_start(
    architecture: str, seed: int
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield the name, model_cfg, preprocess_cfg and options with which OpenCLIP makes random towers.

    While the context is open, the CPU's generator, which draws the weights, continues from `seed`.
    """
    import open_clip

    options = {"load_weights": False, "pretrained_text": False}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        if architecture in scratch.RESNETS:
            name = f"local-dir:{folder}"
            model_cfg, preprocess_cfg = scratch.settings(architecture)
            write_config(Path(folder), model_cfg, preprocess_cfg)
        else:
            name, model_cfg, preprocess_cfg = (
                architecture,
                open_clip.get_model_config(architecture),
                {},
            )
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        yield name, model_cfg, preprocess_cfg, options


def _converted(architecture: str, file: Path) -> Path:
    """Write a file of weights as a checkpoint folder in the user's cache; return the folder.

    A file that pickles anything but tensors and plain values is refused: unpickling would run code.
    """
    import open_clip

    with _quiet_open_clip(), asking_the_hub():  # the hub has the tokenizers of some architectures
        try:
            model = open_clip.create_model(
                architecture, pretrained=str(file), require_pretrained=True, weights_only=True
            )
            tokenizer = open_clip.get_tokenizer(architecture)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{file} holds more than tensors, and reading that could run whatever code its "
                "author put in; where you trust it, load it with PyTorch and save its state_dict "
                "alone: safetensors.torch.save_file(state_dict, 'weights.safetensors')"
            ) from error
        except Exception as error:  # a truncated file, another architecture, no network
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"{file} could not be loaded as {architecture} ({reason}); name the architecture "
                "that it was trained as"
            ) from error
    loaded = DualEncoder(
        model,
        tokenizer,
        spec=f"{architecture}:{file}",
        identity=checkpoint.Identity("", ""),
        model_cfg=open_clip.get_model_config(architecture),
        preprocess_cfg=model.visual.preprocess_cfg,
        device=torch.device("cpu"),
        precision="float32",
    )
    folder = checkpoint.converted_folder(architecture, file)
    try:
        with whole_folder(folder) as temporary:
            loaded.save(temporary, provenance={"converted_from": os.path.abspath(file)})
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise InputError(f"cannot convert {file} to a folder: {error}") from error
    return folder


def _snapshot(spec: str) -> Path:
    """Fetch a hub repository's checkpoint into the local cache, unless it is there; return its folder.

    Safetensors are preferred; else the .bin, which OpenCLIP reads without unpickling code.
    """
    from huggingface_hub import snapshot_download

    settings = ["*.json", "*.txt", "*.model"]
    try:
        for weights in ("open_clip_*model.safetensors", "open_clip_*model.bin"):
            repository = spec.removeprefix("hf-hub:")
            folder = Path(snapshot_download(repository, allow_patterns=[*settings, weights]))
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository
        raise ModelError(_unreachable(spec, error)) from error
    raise ModelError(
        f"{spec} holds no OpenCLIP weights; name a repository with open_clip_config.json"
    )


def _unreachable(spec: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"model {spec!r} could not be loaded ({reason[:200]}); "
        "use --model builtin, which needs no network, or give the folder of a downloaded checkpoint"
    )


def _identify_loaded(
    model: torch.nn.Module,
    tokenizer: Any,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
) -> checkpoint.Identity:
    state = model.state_dict()
    tensors = (
        (n, (t.float() if t.is_floating_point() else t).numpy()) for n, t in sorted(state.items())
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_settings(Path(scratch), model, tokenizer, model_cfg, preprocess_cfg)
        tokens = checkpoint.tokenizer_digest(Path(scratch))
    return checkpoint.combine_identity(
        model_cfg, preprocess_cfg, tokens, checkpoint.weights_digest(tensors)
    )


@contextlib.contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Hide what OpenCLIP logs to the root logger; errors are raised anyway."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname

    root = logging.getLogger()
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(keep)
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
            handler.removeFilter(keep)
        if silencer:
            root.removeHandler(silencer)
