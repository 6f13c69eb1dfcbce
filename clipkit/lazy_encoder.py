"""An encoder by its spec: named at once, its towers loaded by the first who needs them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clipkit import checkpoint
from clipkit.errors import ClipkitError
from clipkit.text_towers.bert import TextTower, open_text_tower

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from clipkit.towers import DualEncoder

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # importing torch holds up every other thread


class LazyEncoder:
    """What indexing, searching and evaluating ask of an encoder, without torch until it is needed.

    Until the towers are loaded, which takes seconds, texts go through the numpy text tower where
    the checkpoint has one. Threads may share it.
    """

    def __init__(self, spec: str, *, device: str = "auto", precision: str = "auto") -> None:
        self.spec = spec
        self._options: dict[str, Any] = {"device": device, "precision": precision}
        self._towers: DualEncoder | None = None
        self._texts: TextTower | None = None
        self._loading = threading.Lock()
        # None: the model must be loaded to know.
        self.known_id = checkpoint.identify(spec)

    @property
    def state(self) -> Literal["unloaded", "loading", "ready"]:
        if self._towers is not None or self._texts is not None:
            return "ready"
        return "loading" if self._loading.locked() else "unloaded"

    @property
    def encoder_id(self) -> str:
        return self.known_id or self.towers().encoder_id

    @property
    def precision(self) -> str:
        """What the towers compute in on the chosen device, said without loading them."""
        if self._options["precision"] != "auto":
            return str(self._options["precision"])
        from clipkit import towers

        device = towers.choose_device(self._options["device"])
        return towers.choose_precision(device, self._options["precision"])

    @property
    def preferred_side(self) -> int:
        return self.towers().preferred_side

    def towers(self) -> DualEncoder:
        """The whole model, loaded by the first caller. ModelError, each time anew, if it cannot be."""
        with self._loading:
            if self._towers is None:
                from clipkit import towers

                loaded = towers.load(self.spec, **self._options)
                self.known_id, self._towers = loaded.encoder_id, loaded
                self._texts = None
            return self._towers

    def warm(self) -> None:
        """Load in the background, so that the first search need not wait."""
        threading.Thread(target=self._warm, name="clipkit-model", daemon=True).start()

    def _warm(self) -> None:
        try:
            self._texts = open_text_tower(self.spec)
            if self._texts is not None:  # words can be searched: let the page open first
                time.sleep(PAUSE_SECONDS)
            self.towers()
        except ClipkitError as error:  # the first search says it again, to the person
            log.warning("the model cannot be loaded: %s", error)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if self._towers is None and self._texts is None:
            self._texts = open_text_tower(self.spec)
        tower = self._towers or self._texts or self.towers()
        return tower.encode_texts(texts)

    def encode_images(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        return self.towers().encode_images(images)
