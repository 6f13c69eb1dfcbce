"""The dual encoder of an exported folder: the interface of `towers.DualEncoder`, without torch."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit import checkpoint
from clipkit.arrays import Float32, Int64
from clipkit.checkpoint import Export, TowerConfig
from clipkit.errors import InputError, ModelError, check_choice
from clipkit.options import imported
from clipkit.runtimes import RUNTIMES, standalone
from clipkit.runtimes.graphs import Graph

PART = 8  # rows of one call, as in towers.encoder


class ExportedTexts:
    """Encode texts as unit vectors with the text tower of an exported folder. Threads may share it."""

    def __init__(self, folder: Path, export: Export, graph: Graph, cores: _Cores) -> None:
        self.dim = export.dim
        self._graph = graph
        self._cores = cores
        self._text = export.text
        file = folder / export.text["tokenizer"]
        try:
            self._tokenizer = standalone.open_tokenizer(file, export.text)
        except Exception as error:  # the library raises a bare Exception
            raise ModelError(
                f"{file} is not a tokenizer ({error}); export the model again"
            ) from error

    def tokenize(self, texts: Sequence[str]) -> Int64:
        """Tokenize texts: int64 (N, L), L being the longest text's or, for a tower that always takes
        its full length, the context length. Threads may call it."""
        return standalone.tokenize(self._tokenizer, texts, self._text)

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float32:
        """Encode texts as float32 (N, D), unit rows; without texts the shape is (0, D).

        Texts of similar length are computed together, since a row's vector does not depend on the
        others. Raises InputError for a string in place of a list.
        """
        if isinstance(texts, str):
            raise InputError(f"encode_texts takes a list of texts, got the string {texts!r}")
        vectors = np.empty((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            order = sorted(range(len(batch)), key=lambda at: len(batch[at]))
            parts = [order[at : at + PART] for at in range(0, len(order), PART)]
            tokens = (self.tokenize([batch[at] for at in part]) for part in parts)
            results = self._cores.map(self._graph, list(tokens))
            for part, rows in zip(parts, results, strict=True):
                vectors[[start + at for at in part]] = rows
        return vectors


class ExportedEncoder:
    """Encode pictures and texts with an exported folder (see `checkpoint.Export`); no torch is imported.

    `encoder_id` and `space_id` are those of the model that was exported where the files compute in
    float32, since their vectors are then its own within rounding, which the export has checked. A tower
    in int8 gives other vectors: its ids depend on its file, and an index never takes them for the
    model's. An int8 text tower over a float32 image tower shares the model's `space_id`: it may search
    the vectors that the model has made. A file that is not the exported one raises ModelError.

    Each tower is opened when it is first used. Threads may share it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spec: str | None = None,
        runtime: str = "onnx",
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        check_choice("runtime", runtime, RUNTIMES)
        identity = checkpoint.identify(str(folder))
        assert identity is not None  # it raises for a folder without an export
        self.spec = spec or str(folder)
        self.folder = folder
        self.runtime = runtime
        self.encoder_id, self.space_id = identity
        self.export = checkpoint.read_export(folder)
        self.config = TowerConfig.from_open_clip(*checkpoint.read_config(folder))
        if runtime == "openvino" and "int8" in (
            self.export.image["precision"],
            self.export.text["precision"],
        ):
            # The built-in model's pictures: cosine 0.70 to the model, against 0.99 in ONNX Runtime.
            raise ModelError(
                f"{folder} is in int8, which OpenVINO computes otherwise than ONNX Runtime, so that its "
                "vectors would be others; use --runtime onnx, or export it without --int8"
            )
        self.precision = exported_precision(self.export, runtime, precision)
        self.device = "cpu" if device == "auto" else device
        self._options = {"device": device, "precision": precision}
        self._cores = _Cores(usable_cores() if self.device == "cpu" else 1)
        self._opening = threading.RLock()
        self._image: Graph | None = None
        self._texts: ExportedTexts | None = None

    @property
    def known_id(self) -> str:
        """The `encoder_id`; with `towers`, what makes this a `lazy_encoder.Encoder`."""
        return self.encoder_id

    def towers(self) -> ExportedEncoder:
        """Return self."""
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
        """Return a batch size that keeps the cores busy and still lets progress be reported."""
        return min(2 * PART * self._cores.count, 256)

    @property
    def logit_scale(self) -> float:
        """Return the factor of cosines before a softmax: that of the model that was exported."""
        return self.export.logit_scale

    def describe(self) -> str:
        """Return the encoder's settings as JSON, to be stored with its vectors."""
        return json.dumps(asdict(self.config))

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize an RGB picture of any size to uint8 (3, H, W), as the image tower takes it.

        The geometry is that of `DualEncoder.preprocess`; the resize is Pillow's, which differs from
        torch's by a rounding step of some pixels. Threads may call it.
        """
        return standalone.preprocess(image, self.export.image["input"])

    def encode_images(
        self,
        images: Sequence[Image.Image] | Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
        *,
        batch_size: int | None = None,
    ) -> Float32:
        """Encode pictures as float32 (N, D), unit rows.

        images: RGB pictures of any size, or the results of `preprocess`, uint8 arrays (3, H, W),
            listed or stacked. Without pictures the result has shape (0, D).
        Raises InputError for arrays of another shape or dtype.
        """
        size = batch_size or self.preferred_batch
        vectors = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), size):
            batch = self._stack(images[start : start + size])
            parts = [batch[at : at + PART] for at in range(0, len(batch), PART)]
            rows = np.concatenate(list(self._cores.map(self._image_tower(), parts)))
            vectors[start : start + size] = rows
        return vectors

    def _stack(self, images: Iterable[Any]) -> npt.NDArray[np.uint8]:
        rows = [i if not isinstance(i, Image.Image) else self.preprocess(i) for i in images]
        batch = np.stack(rows)
        expected = (3, *self.config.image_size)
        if batch.dtype != np.uint8 or batch.shape[1:] != expected:
            raise InputError(
                f"preprocessed pictures must be uint8 of shape {expected}, "
                f"got {batch.dtype} {batch.shape[1:]}; use ExportedEncoder.preprocess"
            )
        return batch

    def tokenize(self, texts: Sequence[str]) -> Int64:
        """Tokenize texts, as `ExportedTexts.tokenize`."""
        return self.texts().tokenize(texts)

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float32:
        """Encode texts as float32 (N, D), unit rows, as `ExportedTexts.encode_texts`."""
        return self.texts().encode_texts(texts, batch_size=batch_size)

    def texts(self) -> ExportedTexts:
        """Open the text tower, once."""
        with self._opening:
            if self._texts is None:
                graph = self._open(self.export.text["file"])
                self._texts = ExportedTexts(self.folder, self.export, graph, self._cores)
            return self._texts

    def _image_tower(self) -> Graph:
        with self._opening:
            if self._image is None:
                self._image = self._open(self.export.image["file"])
            return self._image

    def _open(self, file: str) -> Graph:
        open_graph = imported(RUNTIMES[self.runtime])
        graph: Graph = open_graph(self.folder / file, calls=self._cores.count, **self._options)
        return graph


def exported_precision(export: Export, runtime: str, precision: str) -> str:
    """Return how the towers compute, such as "float32 onnx" or "int8 onnx"; it names cached features."""
    kinds = {export.image["precision"], export.text["precision"]}
    kind = "int8" if "int8" in kinds else "float32"
    return f"{kind if precision in ('auto', 'float32') else precision} {runtime}"


def usable_cores() -> int:
    """Return how many threads compute: OMP_NUM_THREADS, else the cores that this process may use."""
    with suppress(ValueError):
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "")))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Cores:
    """Threads that each compute a part of a batch, as `towers.encoder.Cores`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, graph: Graph, parts: Sequence[npt.NDArray[Any]]) -> Iterator[Float32]:
        """Yield the graph's result for each part, in order."""
        one = self.count == 1 or len(parts) < 2
        return map(graph, parts) if one else self._pool.map(graph, parts)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count, "core")
