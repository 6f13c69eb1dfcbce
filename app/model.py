"""The model behind the page: named at once, loaded in the background, loaded once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clipkit import checkpoint
from clipkit.errors import ClipkitError
from clipkit.text_tower import TextTower, open_text_tower

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from clipkit.towers import DualEncoder

__all__ = ["Model"]

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0  # importing torch holds up every other thread


class Model:
    """One encoder by its spec, and what search.Encoder asks of it. Threads may share it.

    Until the towers are loaded, which takes seconds, texts go through the numpy text tower where
    the checkpoint has one.
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

    # ---- search.Encoder

    @property
    def encoder_id(self) -> str:
        return self.known_id or self.towers().encoder_id

    @property
    def preferred_side(self) -> int:
        return self.towers().preferred_side

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        tower = self._towers or self._texts or self.towers()
        return tower.encode_texts(texts)

    def encode_images(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        return self.towers().encode_images(images)
