"""The model behind the page: named at once, loaded in the background, loaded once."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Literal

from clipkit import checkpoint
from clipkit.errors import ClipkitError

if TYPE_CHECKING:
    from clipkit.towers import DualEncoder

__all__ = ["Model"]

log = logging.getLogger(__name__)


class Model:
    """One encoder by its spec. Threads may share it."""

    def __init__(self, spec: str, *, device: str = "auto", precision: str = "auto") -> None:
        self.spec = spec
        self._device = device
        self._precision = precision
        self._lock = threading.Lock()
        self._encoder: DualEncoder | None = None
        # Read from the files where possible: filters and `similar` then never wait for the towers.
        self._encoder_id = checkpoint.identify(spec)

    @property
    def encoder_id(self) -> str | None:
        """None for a model that must be loaded to know, until it is."""
        return self._encoder_id

    @property
    def state(self) -> Literal["unloaded", "loading", "ready"]:
        if self._encoder is not None:
            return "ready"
        return "loading" if self._lock.locked() else "unloaded"

    def encoder(self) -> DualEncoder:
        """The towers, loaded by the first caller. ModelError, each time anew, if they cannot be."""
        with self._lock:
            if self._encoder is None:
                from clipkit import towers

                self._encoder = towers.load(
                    self.spec,
                    device=self._device,
                    precision=self._precision,  # type: ignore[arg-type]
                )
                self._encoder_id = self._encoder.encoder_id
            return self._encoder

    def warm(self) -> None:
        """Load in the background, so that the first search need not wait for all of it."""
        threading.Thread(target=self._warm, name="clipkit-model", daemon=True).start()

    def _warm(self) -> None:
        try:
            self.encoder()
        except ClipkitError as error:  # the first search says it again, to the person
            log.warning("the model cannot be loaded: %s", error)
