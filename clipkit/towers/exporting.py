"""Write the two towers of a model as ONNX files, in float32 or int8, for other runtimes than torch.

The folder (see `checkpoint.Export`) is used by `clipkit.runtimes`, and by ONNX Runtime without
clipkit: the pixels' normalisation and the unit length of the rows are inside the graphs, the number
of rows is free, and so is the length of texts where the tower can take any.

int8 (Jacob et al. 2018, arXiv 1712.05877): weights per output channel, activations as uint8. A
transformer is quantized dynamically: each activation's range is that of the batch at hand. A
convolutional tower is quantized statically, its ranges taken from sample pictures: quantized
dynamically, the built-in model's was eight times slower than float32 and wrong (mean cosine to
float32 0.86 instead of 0.99). Weights per tensor cost the built-in text tower more (cosine 0.973
instead of 0.995). To leave the second product of each feed-forward block in float32 halves its
distance (0.9975) but costs speed, and recall on 1,000 pictures (Flickr8k) moved by at most 0.4
points either way: all of a transformer's products are int8.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

import clipkit
from clipkit import checkpoint, strength
from clipkit.checkpoint import Export
from clipkit.durable import whole_folder
from clipkit.errors import InputError, ModelError, check_choice
from clipkit.runtimes import ExportedEncoder, standalone
from clipkit.towers.encoder import DualEncoder, causal_text_features, is_causal_argmax, write_json
from clipkit.towers.folding import unfolded

log = logging.getLogger(__name__)

SIDES = ("image", "text")
IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE = "image.onnx", "text.onnx", "tokenizer.json"
EXAMPLE_FILE = "example.py"
SAME = 0.9999  # least cosine of a float32 export's vectors to torch's
MOST_INLINE = 1_500_000_000  # bytes of weights inside an ONNX file, which cannot exceed 2 GB
CALIBRATION_PICTURES = 64
PRODUCTS = ("MatMul", "Gemm")
# Of every kind that tokenizers disagree on: case, accents, scripts, entities, digits, length.
CHECK_TEXTS = (
    "a photo of two dogs",
    "",
    "Don't STOP, it's 12,345.67 %!",
    "  a  caf\u00e9 &amp; bar,\tna\u00efve\nline ",
    "\u732b\u306e\u5199\u771f \u043a\u043e\u0442 \U0001f600",
    "a red_green-blue house " * 60,
)
"""Texts whose tokens must be the model's own before an export is written."""


def export_onnx(
    encoder: DualEncoder,
    folder: Path,
    *,
    int8: Collection[str] = (),
    pictures: Sequence[Image.Image] = (),
    overwrite: bool = False,
) -> Export:
    """Write the towers of `encoder`, loaded on the CPU in float32, to `folder`; return the manifest.

    int8: the towers to compute in int8: "image", "text", both or none.
    pictures: RGB pictures such as the model will see; an int8 convolutional tower takes the ranges of
        its activations from the first CALIBRATION_PICTURES of them.
    Raises InputError if the folder exists (unless `overwrite` and it is an export) or the encoder is
    rounded, ModelError without the packages `clipkit[onnx]`, or for a tower whose graph or tokenizer
    gives something else than the model.
    """
    _check_packages()
    if encoder.precision != "float32" or encoder.device.type != "cpu":
        raise InputError(
            f"cannot export {encoder.spec} in {encoder.precision} on {encoder.device}; "
            "load it with device='cpu', precision='float32'"
        )
    for side in int8:
        check_choice("int8", side, SIDES)
    if "image" in int8 and is_convolutional(encoder) and not pictures:
        raise InputError(f"int8 needs sample pictures for the image tower of {encoder.spec}")
    if folder.exists() and any(folder.iterdir()):
        if not (overwrite and checkpoint.is_export(str(folder))):
            raise InputError(f"{folder} exists; name another folder with --out, or --overwrite it")
        shutil.rmtree(folder)
    with whole_folder(folder) as place, _quiet():
        _write_image(encoder, place / IMAGE_FILE)
        any_length = _write_text(encoder, place / TEXT_FILE)
        pad_id, zero_ids, clean = _write_tokenizer(encoder, place / TOKENIZER_FILE)
        if "image" in int8:
            _quantize_image(encoder, place / IMAGE_FILE, pictures[:CALIBRATION_PICTURES])
        if "text" in int8:
            # Gather: the table of token embeddings, most of a small tower's bytes.
            _quantize_dynamically(place / TEXT_FILE, (*PRODUCTS, "Gather"))
        settings = encoder.settings()
        write_json(place / checkpoint.CONFIG_FILE, settings)
        config, dim = encoder.config, encoder.dim
        precision = {side: "int8" if side in int8 else "float32" for side in SIDES}
        length: Any = "length" if any_length else config.context_length
        export = Export(
            model=encoder.spec,
            source=checkpoint.Identity(encoder.encoder_id, encoder.space_id),
            dim=dim,
            logit_scale=encoder.logit_scale,
            image={
                "file": IMAGE_FILE,
                "precision": precision["image"],
                "input": {
                    "name": "pixels",
                    "dtype": "uint8",
                    "shape": ["n", 3, *config.image_size],
                    "channels": "RGB",
                    "resize_mode": config.resize_mode,
                    "interpolation": config.interpolation,
                    "antialias": True,
                    "fill": config.fill,
                    "normalisation": "in the graph: give 0 to 255",
                    "mean": config.mean,
                    "std": config.std,
                },
                "output": {
                    "name": "vectors",
                    "dtype": "float32",
                    "shape": ["n", dim],
                    "unit": True,
                },
            },
            text={
                "file": TEXT_FILE,
                "precision": precision["text"],
                "input": {"name": "tokens", "dtype": "int64", "shape": ["n", length]},
                "output": {
                    "name": "vectors",
                    "dtype": "float32",
                    "shape": ["n", dim],
                    "unit": True,
                },
                "tokenizer": TOKENIZER_FILE,
                "clean": clean,
                "context_length": config.context_length,
                "any_length": any_length,
                "pad_id": pad_id,
                "zero_ids": zero_ids,
            },
            files={path.name: checkpoint.sha256(path) for path in sorted(place.iterdir())},
            clipkit=clipkit.__version__,
        )
        export.write(place)
        shutil.copy(str(standalone.__file__), place / EXAMPLE_FILE)
        (place / "README.md").write_text(_readme(export), encoding="utf-8")
        _check(encoder, place)
        _copy_calibration(encoder, place)
    return export


def is_convolutional(encoder: DualEncoder) -> bool:
    """Return whether the image tower convolves beyond its first layers: a CNN and no transformer."""
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in encoder.model.visual.modules())  # type: ignore[union-attr]
    products = sum(isinstance(m, torch.nn.Linear) for m in encoder.model.visual.modules())  # type: ignore[union-attr]
    return convolutions > products


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModelError(
            f"export needs {', '.join(missing)}, which {verb} not installed; "
            "install what is missing: pip install 'clipkit[onnx]'"
        )


# ---- graphs


class _ImageGraph(torch.nn.Module):
    """uint8 pixels (N, 3, H, W) -> float32 unit rows (N, D)."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder.image_features(pixels).float(), dim=-1)


class _TextGraph(torch.nn.Module):
    """int64 tokens (N, L) -> float32 unit rows (N, D), computing all L positions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        text: Any = getattr(self.model, "text", self.model)
        if is_causal_argmax(text):  # OpenCLIP's own encode_text needs the full length
            features = causal_text_features(text, tokens, tokens.argmax(dim=-1))
        else:
            features = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)


def _write_image(encoder: DualEncoder, file: Path) -> None:
    pixels = torch.zeros(2, 3, *encoder.config.image_size, dtype=torch.uint8)
    with unfolded(encoder.model):  # a runtime folds batch norms into the weights itself
        _write_graph(_ImageGraph(encoder), pixels, file, "pixels", {0: "n"})


def _write_text(encoder: DualEncoder, file: Path) -> bool:
    """Write the text tower; return whether it takes any number of tokens up to the context length."""
    text: Any = getattr(encoder.model, "text", encoder.model)
    masks_padding = getattr(getattr(text, "config", None), "pad_token_id", None) is not None
    tokens, graph = encoder.tokenize(CHECK_TEXTS[:2]), _TextGraph(encoder.model)
    if masks_padding or is_causal_argmax(text):
        try:
            _write_graph(graph, tokens, file, "tokens", {0: "n", 1: "length"})
            return True
        except Exception as error:  # torch.export: an architecture that needs the full length
            log.info("%s: a fixed text length, since %s", encoder.spec, str(error)[:200])
    _write_graph(graph, tokens, file, "tokens", {0: "n"})
    return False


def _write_graph(
    module: torch.nn.Module, example: torch.Tensor, file: Path, name: str, free: Mapping[int, str]
) -> None:
    most = {"n": None, "length": example.shape[-1]}
    dims = {axis: torch.export.Dim(label, max=most[label]) for axis, label in free.items()}
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    torch.onnx.export(
        module.eval(),
        (example,),
        file,
        input_names=[name],
        output_names=["vectors"],
        dynamic_shapes=(dims,),
        dynamo=True,
        verbose=False,
        external_data=size > MOST_INLINE,
    )


# ---- tokenizers


def _write_tokenizer(encoder: DualEncoder, file: Path) -> tuple[int, list[int], str]:
    """Write the tokenizer for the library `tokenizers`; return its padding, the ids that become 0,
    and how texts are cleaned before it. Raises ModelError if it gives other tokens."""
    from tokenizers import Tokenizer

    own = encoder.tokenizer
    inner: Any = getattr(own, "tokenizer", None)
    if inner is None:
        tokenizer = _clip_tokenizer(own)
    elif (backend := getattr(inner, "backend_tokenizer", None)) is not None:
        tokenizer = Tokenizer.from_str(backend.to_str())
    else:
        raise ModelError(f"cannot export {encoder.spec}: its tokenizer has no tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(file))
    pad_id = int(getattr(inner, "pad_token_id", None) or 0)
    zero_ids = [int(inner.sep_token_id)] if getattr(own, "strip_sep_token", False) else []
    return pad_id, zero_ids, own.clean_fn.__name__.removeprefix("_clean_")


def _clip_tokenizer(own: Any) -> Any:
    """Return OpenCLIP's own byte-pair tokenizer as one of the library `tokenizers`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    start, end = own.sot_token_id, own.eot_token_id
    tokenizer = Tokenizer(
        models.BPE(vocab=own.encoder, merges=merges, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    words = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    names = own.decoder
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[start]} $A {names[end]}",
        special_tokens=[(names[start], start), (names[end], end)],
    )
    return tokenizer


# ---- int8


def _quantize_dynamically(file: Path, operations: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(file) as prepared:
        quantize_dynamic(
            prepared,
            file,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(operations),
            use_external_data_format=_external(prepared),
        )


def _quantize_image(encoder: DualEncoder, file: Path, pictures: Sequence[Image.Image]) -> None:
    if not is_convolutional(encoder):
        _quantize_dynamically(file, PRODUCTS)  # the patches' convolution stays float32
        return
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    pixels = np.stack([encoder.preprocess(picture).numpy() for picture in pictures])
    with _prepared(file) as prepared:
        quantize_static(
            prepared,
            file,
            _Batches(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # of the batches' extremes, not the extreme of all: outliers do not widen the range
            extra_options={"CalibMovingAverage": True},
            use_external_data_format=_external(prepared),
        )


class _Batches:
    """The calibration pictures, as ONNX Runtime's CalibrationDataReader gives them."""

    def __init__(self, pixels: npt.NDArray[np.uint8], rows: int = 8) -> None:
        self._batches = [pixels[at : at + rows] for at in range(0, len(pixels), rows)]
        self._rest = iter(self._batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._rest, None)
        return None if batch is None else {"pixels": batch}

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def _prepared(file: Path) -> Iterator[Path]:
    """Yield a copy of an ONNX file with shapes inferred and norms folded, as quantization wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = file.with_name(f"prepared-{file.name}")
    quant_pre_process(
        file,
        prepared,
        skip_symbolic_shape=True,
        save_as_external_data=_external(file),
        all_tensors_to_one_file=True,
        external_data_location=f"{prepared.name}.data",
    )
    for old in file.parent.glob(f"{file.name}*"):
        old.unlink()
    try:
        yield prepared
    finally:
        for rest in file.parent.glob(f"{prepared.name}*"):
            rest.unlink()


def _external(file: Path) -> bool:
    """Return whether the weights are too large to be inside one ONNX file."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) > MOST_INLINE


# ---- checks


def _check(encoder: DualEncoder, folder: Path) -> None:
    """Raise ModelError unless the export gives the model's tokens and, in float32, its vectors."""
    exported = ExportedEncoder(folder, spec=encoder.spec, device="cpu")
    own = encoder.tokenize(CHECK_TEXTS).numpy()
    tokens = exported.tokenize(CHECK_TEXTS)
    rest = own[:, tokens.shape[1] :]
    pad_id = exported.export.text["pad_id"]
    if not (np.array_equal(own[:, : tokens.shape[1]], tokens) and (rest == pad_id).all()):
        raise ModelError(
            f"cannot export {encoder.spec}: its tokenizer ({type(encoder.tokenizer).__name__}) does "
            "what a tokenizer.json cannot say"
        )
    generator = np.random.default_rng(0)
    shape = (3, 3, *encoder.config.image_size)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    for side, tower, ours, theirs in (
        (
            "image",
            exported.export.image,
            exported.encode_images(pixels),
            encoder.encode_images(torch.from_numpy(pixels)),
        ),
        (
            "text",
            exported.export.text,
            exported.encode_texts(CHECK_TEXTS),
            encoder.encode_texts(CHECK_TEXTS),
        ),
    ):
        cosine = float((ours * theirs).sum(axis=1).min())
        if tower["precision"] == "float32" and not cosine >= SAME:  # NaN fails too
            raise ModelError(
                f"cannot export {encoder.spec}: the exported {side} tower gives other vectors than "
                f"the model (cosine {cosine:.4f}, it must be {SAME})"
            )


def _copy_calibration(encoder: DualEncoder, folder: Path) -> None:
    """Give an export that is the same encoder the model's calibration, which holds for no other."""
    model = checkpoint.find_folder(encoder.spec)
    if model is not None and (model / strength.FILE).is_file():
        exported = checkpoint.identify(str(folder))
        if exported is not None and exported.encoder_id == encoder.encoder_id:
            shutil.copy(model / strength.FILE, folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.export and the quantizer warn and log; errors are raised anyway."""
    root, level = logging.getLogger(), logging.getLogger().level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)


# ---- the README of an exported folder


def _readme(export: Export) -> str:
    image, text = export.image, export.text
    pixels, tokens = image["input"], text["input"]
    return f"""# {export.model}, exported as ONNX

`image.onnx` ({image["precision"]}) and `text.onnx` ({text["precision"]}) map pictures and texts to unit
vectors of {export.dim} numbers; the dot product of two is their cosine. To use them without clipkit:

    pip install onnxruntime numpy pillow tokenizers ftfy
    python example.py "a red car" photo.jpg

`example.py` is all the code that it takes. `export.json` describes inputs and outputs:

- `pixels`, uint8 {pixels["shape"]}: RGB from 0 to 255, resize mode "{pixels["resize_mode"]}",
  {pixels["interpolation"]}; mean and standard deviation are inside the graph.
- `tokens`, int64 {tokens["shape"]}: from `tokenizer.json`, cut at {text["context_length"]}
  tokens, padded with {text["pad_id"]}.
- `vectors`, float32 ["n", {export.dim}]: rows of length 1, from both graphs.

`report.json` compares the vectors with those of the model in torch. With clipkit:
`clipkit index FOLDER --model THIS_FOLDER`, or `clipkit.load("THIS_FOLDER")`.

Written by clipkit {export.clipkit}.
"""
