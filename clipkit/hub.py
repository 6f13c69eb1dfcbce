"""Requests to the Hugging Face hub, offline if its host cannot be resolved."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")

_lock = threading.Lock()
_asking = 0  # blocks that are open now, in all threads
_before: tuple[int, dict[str, bool]] = (0, {})  # level and offline modes before the first of them


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Silence the hub's clients, and put them offline if the hub's host cannot be resolved.

    Offline they answer from their cache or fail at once, instead of retrying for half a minute a file
    with a warning each time. Errors pass through to the caller. These settings are the process's: they
    last while any thread is in such a block, and the last to leave restores what was before the first.
    """
    global _asking, _before
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    unreachable = not constants.HF_HUB_OFFLINE and not _has_address(constants.ENDPOINT)
    with _lock:
        if not _asking:
            modes = {name: config.HF_HUB_OFFLINE for name, config in _configs().items()}
            _before = (logger.level, modes)
        _asking += 1
        logger.setLevel(logging.ERROR)
        if unreachable:
            for config in _configs().values():
                config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _asking -= 1
            if not _asking:
                level, modes = _before
                logger.setLevel(level)
                for name, config in _configs().items():
                    # one that was imported meanwhile took the hub's mode for its own
                    config.HF_HUB_OFFLINE = modes.get(name, modes["huggingface_hub"])


def _configs() -> dict[str, Any]:
    """Return what holds an offline mode: the hub's client's constants, and those of `datasets` if it
    has been imported."""
    from huggingface_hub import constants

    configs: dict[str, Any] = {"huggingface_hub": constants}
    if (datasets := sys.modules.get("datasets")) is not None and hasattr(datasets, "config"):
        configs["datasets"] = datasets.config
    return configs


def _has_address(endpoint: str) -> bool:
    """Return whether the host can be resolved, or a proxy is set, which resolves names itself."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    place = urlsplit(endpoint)
    try:
        return bool(socket.getaddrinfo(place.hostname, place.port or 443))
    except OSError:
        return False
