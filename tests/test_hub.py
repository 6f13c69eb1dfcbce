"""The hub is asked only where it can be found; nothing here reaches a network."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import types
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


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_threads_that_overlap_leave_everything_as_it_was(
    online: list[Any], first_to_leave: int
) -> None:
    """The second thread enters while the first has the clients offline, which is not how they were."""
    level = logging.getLogger("huggingface_hub").level
    inside = [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]

    def ask(which: int) -> None:
        with asking_the_hub():
            inside[which].set()
            assert leave[which].wait(60)

    threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
    for which in (0, 1):
        threads[which].start()
        assert inside[which].wait(60)
    leave[first_to_leave].set()
    threads[first_to_leave].join()
    assert constants.is_offline_mode()  # the other is still inside
    assert logging.getLogger("huggingface_hub").level == logging.ERROR
    leave[1 - first_to_leave].set()
    threads[1 - first_to_leave].join()
    assert not constants.is_offline_mode() and online
    assert logging.getLogger("huggingface_hub").level == level


def test_a_client_imported_meanwhile_does_not_stay_offline(
    online: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes its mode from the hub's client when it is imported."""
    datasets = types.ModuleType("datasets")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with asking_the_hub():
        datasets.config = types.SimpleNamespace(  # type: ignore[attr-defined]
            HF_HUB_OFFLINE=constants.HF_HUB_OFFLINE
        )
        monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert datasets.config.HF_HUB_OFFLINE is False and online
