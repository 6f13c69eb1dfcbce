"""A model by its spec: its identity at once, its towers when something must be encoded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipkit import checkpoint, models
from clipkit.errors import ClipkitError, ModelError
from clipkit.text_towers import TextTower, open_text_tower

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clipkit.towers import DualEncoder

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # importing torch holds up every other thread


class Encoder(Protocol):
    """What indexing, search and evaluation need of a model; `LazyEncoder` and `DualEncoder` are one."""

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
    def towers(self) -> DualEncoder:
        """Load the towers, once. Any thread may call it. Raises ModelError if they cannot be loaded."""

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts to float32 (N, D), unit rows."""


class LazyEncoder:
    """An `Encoder` that imports torch and loads the towers only when they are needed.

    Until the towers are loaded, which takes seconds, texts are encoded by the numpy text tower if the
    checkpoint has one. Threads may share it.

    `gone` is for an index whose model has left its place: its identity, and the message of the
    ModelError that loading raises while the model is not back.
    """

    def __init__(
        self,
        spec: str,
        *,
        device: str = "auto",
        precision: str = "auto",
        gone: tuple[checkpoint.Identity, str] | None = None,
    ) -> None:
        self.spec = spec
        self._gone = gone
        self._options: dict[str, Any] = {"device": device, "precision": precision}
        self._towers: DualEncoder | None = None
        self._texts: TextTower | None = None
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
        if self._options["precision"] != "auto":
            return str(self._options["precision"])
        from clipkit import towers

        device = towers.choose_device(self._options["device"])
        return towers.choose_precision(device, self._options["precision"])

    def towers(self) -> DualEncoder:
        """Return the whole model; the first caller loads it.

        Raises ModelError if it cannot be loaded; the next call tries again.
        """
        with self._loading:
            if self._towers is None:
                if self._gone and models.is_gone(self.spec):
                    raise ModelError(self._gone[1])
                models.check(self.spec)  # before the seconds that importing torch takes
                from clipkit import towers

                loaded = towers.load(self.spec, **self._options)
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

    def _text_tower(self) -> TextTower | None:
        """Return the numpy text tower, opened once; None if the checkpoint has none, or no more once the
        towers are loaded."""
        with self._opening:
            if self._texts is None and self._towers is None:
                self._texts = open_text_tower(self.spec)
            return self._texts

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
