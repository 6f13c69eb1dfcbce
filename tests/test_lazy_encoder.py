"""A model by its spec: nothing is loaded before it is needed, and then once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit import towers
from clipkit.errors import ModelError
from clipkit.lazy_encoder import LazyEncoder


def test_many_threads_load_the_towers_once(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads ask at once. Fails without the lock: the first load takes long enough for all."""
    load, loads = towers.load, []
    asked = threading.Barrier(8)

    def counting(*args: Any, **options: Any) -> towers.DualEncoder:
        loads.append(1)
        return load(*args, **options)

    monkeypatch.setattr(towers, "load", counting)
    encoder = LazyEncoder(str(tiny_checkpoint()), device="cpu", precision="float32")
    assert (encoder.state, encoder.known_id, encoder.precision) == (
        "unloaded",
        encoder.encoder_id,
        "float32",
    )
    assert not loads
    loaded: list[towers.DualEncoder] = []

    def ask() -> None:
        asked.wait(30)
        loaded.append(encoder.towers())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert all(one is loaded[0] for one in loaded)
    assert encoder.state == "ready"


def test_a_load_that_fails_is_tried_again(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = towers.load

    def failing(*_: Any, **__: Any) -> towers.DualEncoder:
        raise ModelError("the disk is away")

    encoder = LazyEncoder(str(tiny_checkpoint()), device="cpu", precision="float32")
    monkeypatch.setattr(towers, "load", failing)
    with pytest.raises(ModelError, match="the disk is away"):
        encoder.towers()
    monkeypatch.setattr(towers, "load", load)
    rows = encoder.towers().encode_texts(["a cat"])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_loaded_encoder_may_stand_for_a_lazy_one(tiny_checkpoint: Callable[..., Path]) -> None:
    """Search and indexing take either."""
    loaded = towers.load(str(tiny_checkpoint()), device="cpu", precision="float32")
    assert loaded.towers() is loaded
    lazy = LazyEncoder(str(tiny_checkpoint()))
    assert loaded.known_id == loaded.encoder_id == lazy.known_id
    assert loaded.space_id == lazy.space_id and lazy.state == "unloaded"
