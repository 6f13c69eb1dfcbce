"""Requests to the Hugging Face hub, offline if its host cannot be resolved."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Silence the hub's clients, and put them offline if the hub's host cannot be resolved.

    Offline they answer from their cache or fail at once, instead of retrying for half a minute a file
    with a warning each time. Errors pass through to the caller.
    """
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    datasets = sys.modules.get("datasets")
    logger.setLevel(logging.ERROR)
    if not offline and not _has_address(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        if datasets is not None:
            datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline
        if datasets is not None:
            datasets.config.HF_HUB_OFFLINE = offline


def _has_address(endpoint: str) -> bool:
    """Return whether the host can be resolved, or a proxy is set, which resolves names itself."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    place = urlsplit(endpoint)
    try:
        return bool(socket.getaddrinfo(place.hostname, place.port or 443))
    except OSError:
        return False
