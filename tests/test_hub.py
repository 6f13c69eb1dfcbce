"""The hub is asked only where it can be found; nothing here reaches a network."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
from huggingface_hub import constants

from clipkit.hub import asking_the_hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As outside of the tests: not offline by wish, no proxy. The hosts that were asked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked: list[Any] = []

    def resolve(host: str, port: int) -> list[Any]:
        asked.append((host, port))
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_hub_without_an_address_is_not_asked_again_and_again(
    online: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example:8443/hub")
    with asking_the_hub():
        assert constants.is_offline_mode()
        assert logging.getLogger("huggingface_hub").level == logging.ERROR
    assert not constants.is_offline_mode()
    assert online == [("mirror.example", 8443)]


def test_a_hub_that_is_found_is_asked(online: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ["an address"])
    with asking_the_hub():
        assert not constants.is_offline_mode()
    assert not online


def test_behind_a_proxy_only_the_proxy_knows(
    online: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    with asking_the_hub():
        assert not constants.is_offline_mode()
    assert not online


def test_what_fails_leaves_everything_as_it_was(online: list[Any]) -> None:
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(OSError), asking_the_hub():
        raise OSError("no route")
    assert not constants.is_offline_mode() and online
    assert logging.getLogger("huggingface_hub").level == level
