"""A model by its spec: its identity at once, its towers when something must be encoded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipkit import checkpoint, models
from clipkit.errors import ClipkitError, ModelError, check_choice
from clipkit.text_towers import TextTower, open_text_tower

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from clipkit.runtimes import ExportedTexts

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # importing torch holds up every other thread


class Encoder(Protocol):
    """The interface of a model for indexing, search and evaluation, such as `LazyEncoder`."""

    @property
    def spec(self) -> str: ...
    @property
    def known_id(self) -> str | None:
        """The encoder_id if it is known without loading the towers."""

    @property
    def encoder_id(self) -> str: ...
    @property
    def space_id(self) -> str:
        """What the vectors of pictures are: models with the same picture side share it."""

    @property
    def precision(self) -> str: ...
    def towers(self) -> Towers:
        """Load the towers, once. Any thread may call it. Raises ModelError if they cannot be loaded."""

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts to float32 (N, D), unit rows."""


class Towers(Encoder, Protocol):
    """Loaded towers, in any runtime: `towers.DualEncoder` and `runtimes.ExportedEncoder` are one."""

    @property
    def device(self) -> Any:
        """Return the device that they compute on; its text is "cpu", "cuda:1" and so on."""

    @property
    def dim(self) -> int: ...
    @property
    def preferred_side(self) -> int: ...
    @property
    def preferred_batch(self) -> int: ...
    @property
    def logit_scale(self) -> float: ...
    def describe(self) -> str: ...
    def preprocess(self, image: Image.Image) -> Any:
        """Resize an RGB picture for `encode_images`."""

    def encode_images(
        self, images: Any, *, batch_size: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Encode pictures, or what `preprocess` made of them, to float32 (N, D), unit rows."""


def load(spec: str, *, runtime: str = "auto", device: str = "auto", precision: str = "auto") -> Any:
    """Load the towers that `spec` names (see `clipkit.towers`), or an exported folder.

    runtime: "torch" (a `DualEncoder`); "onnx", "openvino" or another of `clipkit.runtimes.RUNTIMES` (an
    `ExportedEncoder`, which has the same methods): the spec is then a folder that `clipkit export`
    wrote, or a checkpoint that has one inside; "auto" is "onnx" for an exported folder, else torch.
    device and precision: as of `towers.load`, or of `runtimes.graphs`.
    Raises ModelError, in one sentence, for a spec that is unknown or cannot be fetched.
    """
    folder = exported_folder(spec, runtime)
    if folder is None:
        from clipkit import towers

        return towers.load(spec, device=device, precision=precision)  # type: ignore[arg-type]
    from clipkit.runtimes import ExportedEncoder

    runtime = "onnx" if runtime == "auto" else runtime
    return ExportedEncoder(folder, runtime=runtime, device=device, precision=precision)


def exported_folder(spec: str, runtime: str) -> Path | None:
    """Return the folder of the ONNX files that `spec` means with this runtime; None for torch.

    Raises InputError for an unknown runtime, ModelError where there are no such files, or only they.
    """
    if runtime == "auto":
        return checkpoint.find_export(spec) if checkpoint.is_export(spec) else None
    if runtime == "torch":
        if checkpoint.is_export(spec):
            raise ModelError(checkpoint.not_for_torch(spec))
        return None
    from clipkit.runtimes import RUNTIMES

    check_choice("runtime", runtime, ("auto", "torch", *RUNTIMES))
    folder = checkpoint.find_export(spec)
    if folder is None:
        models.check(spec)
        raise ModelError(
            f"{spec} has no ONNX files for the runtime {runtime}; export it, and name the folder as "
            f"the model: clipkit export {spec} --onnx"
        )
    return folder


class LazyEncoder:
    """An `Encoder` that imports torch and loads the towers only when they are needed.

    Until the towers are loaded, which takes seconds, texts are encoded by a text tower that needs no
    torch if the checkpoint has one: numpy's, or the one of its ONNX files. Threads may share it.

    With a runtime other than torch, or for an exported folder (see `load`), torch is not imported at
    all; `spec` is then the folder of the exported files.

    `gone` is for an index whose model has left its place: its identity, and the message of the
    ModelError that loading raises while the model is not back.
    """

    def __init__(
        self,
        spec: str,
        *,
        device: str = "auto",
        precision: str = "auto",
        runtime: str = "auto",
        gone: tuple[checkpoint.Identity, str] | None = None,
    ) -> None:
        self._exported = exported_folder(spec, runtime)
        # what leads back to these files, wherever the spec is noted
        self.spec = spec = spec if self._exported is None else str(self._exported)
        self._gone = gone
        self._options: dict[str, Any] = {"device": device, "precision": precision}
        self._runtime = "onnx" if runtime == "auto" else runtime  # of exported files
        self._towers: Towers | None = None
        self._texts: TextTower | ExportedTexts | None = None
        self._loading = threading.Lock()
        self._opening = threading.Lock()  # the numpy text tower
        # None: only loading the model tells
        self._identity = checkpoint.identify(spec) or (gone[0] if gone else None)

    @property
    def state(self) -> Literal["unloaded", "loading", "ready"]:
        if self._towers is not None or self._texts is not None:
            return "ready"
        return "loading" if self._loading.locked() else "unloaded"

    @property
    def known_id(self) -> str | None:
        return self._identity.encoder_id if self._identity else None

    @property
    def encoder_id(self) -> str:
        return self.known_id or self.towers().encoder_id

    @property
    def space_id(self) -> str:
        return self._identity.space_id if self._identity else self.towers().space_id

    @property
    def precision(self) -> str:
        """The arithmetic of the towers on the chosen device; does not load them."""
        if self._exported is not None:
            from clipkit.runtimes import exported_precision

            export = checkpoint.read_export(self._exported)
            return exported_precision(export, self._runtime, self._options["precision"])
        if self._options["precision"] != "auto":
            return str(self._options["precision"])
        from clipkit import towers

        device = towers.choose_device(self._options["device"])
        return towers.choose_precision(device, self._options["precision"])

    def towers(self) -> Towers:
        """Return the whole model; the first caller loads it.

        Raises ModelError if it cannot be loaded; the next call tries again.
        """
        with self._loading:
            if self._towers is None:
                if self._gone and models.is_gone(self.spec):
                    raise ModelError(self._gone[1])
                models.check(self.spec)  # before the seconds that importing torch takes
                loaded: Towers = load(
                    self.spec,
                    runtime="torch" if self._exported is None else self._runtime,
                    **self._options,
                )
                self._identity = checkpoint.Identity(loaded.encoder_id, loaded.space_id)
                self._towers = loaded
                self._texts = None
            return self._towers

    def warm(self) -> None:
        """Load in the background, so that the first search does not wait."""
        threading.Thread(target=self._warm, name="clipkit-model", daemon=True).start()

    def prepare_texts(self) -> None:
        """Open the numpy text tower, if there is one, in the background, for `encode_texts` to come."""
        if self.state == "unloaded":
            threading.Thread(target=self._prepare, name="clipkit-texts", daemon=True).start()

    def _prepare(self) -> None:
        with suppress(ClipkitError):  # encode_texts raises it again
            self._text_tower()

    def _text_tower(self) -> TextTower | ExportedTexts | None:
        """Return a text tower that needs no torch, opened once: numpy's or an exported one. None if the
        checkpoint has neither, or no more once the towers are loaded."""
        with self._opening:
            if self._texts is None and self._towers is None:
                self._texts = self._open_exported_texts() or open_text_tower(self.spec)
            return self._texts

    def _open_exported_texts(self) -> ExportedTexts | None:
        """Open the text tower of the exported folder, or of the checkpoint's own export if that is the
        same encoder and ONNX Runtime is installed."""
        if self._exported is not None:
            return self.towers().texts()  # type: ignore[attr-defined, no-any-return]
        beside = None if self._gone else checkpoint.find_export(self.spec)
        if beside is None or find_spec("onnxruntime") is None:
            return None
        with suppress(ModelError):  # an older model's, or damaged: the checkpoint itself is there
            identity = checkpoint.identify(str(beside))
            if identity is not None and identity.encoder_id == self.known_id:
                from clipkit.runtimes import ExportedEncoder

                return ExportedEncoder(beside, device="cpu").texts()
        return None

    def _warm(self) -> None:
        try:
            if self._text_tower() is not None:  # texts can be encoded: let the page open first
                time.sleep(PAUSE_SECONDS)
            self.towers()
        except ClipkitError as error:  # the first search raises it again
            log.warning("the model cannot be loaded: %s", error)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts to float32 (N, D), unit rows, by the numpy text tower or the loaded towers."""
        tower = self._towers or self._text_tower() or self.towers()
        return tower.encode_texts(texts)
