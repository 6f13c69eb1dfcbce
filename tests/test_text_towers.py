"""The numpy text tower against the towers' own output, and what it leaves to them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ftfy
import numpy as np
import pytest
from conftest import TINY, WORDS
from hypothesis import given
from hypothesis import strategies as st

from clipkit import towers
from clipkit.text_towers import erf, fixed, open_text_tower

TEXTS = [*WORDS, "", "a  photo of\n the red house", "unknown words &amp; more", "red blue " * 40]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_equals_the_towers(
    precision: towers.Precision, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = str(tiny_checkpoint("timm-hf"))
    tower = open_text_tower(folder)
    assert tower is not None
    rows = tower.encode_texts(TEXTS)
    assert rows.dtype == np.float32
    expected = towers.load(folder, device="cpu", precision=precision).encode_texts(TEXTS)
    np.testing.assert_allclose(rows, expected, atol=2e-6)
    assert tower.encode_texts([]).shape == (0, tower.dim)


@pytest.mark.parametrize("kind", sorted(set(TINY) - {"timm-hf"}))
def test_other_architectures_are_left_to_the_towers(
    kind: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    assert open_text_tower(str(tiny_checkpoint(kind))) is None


def test_specs_of_a_hub_are_left_to_the_towers() -> None:
    assert open_text_tower("ViT-B-32/laion2b_s34b_b79k") is None


def test_it_needs_no_torch(tiny_checkpoint: Callable[..., Path]) -> None:
    code = (
        "import sys; from clipkit.text_towers import open_text_tower;"
        f"open_text_tower({str(tiny_checkpoint('timm-hf'))!r}).encode_texts(['a car']);"
        "print([m for m in ('torch', 'transformers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_error_function_is_that_of_the_standard_library() -> None:
    x = np.linspace(-7, 7, 20_001, dtype=np.float32)
    expected = [math.erf(value) for value in x.tolist()]
    np.testing.assert_allclose(erf(x), expected, atol=2e-7)


@given(st.text(st.characters(codec="ascii")) | st.text())
def test_texts_are_repaired_as_by_ftfy(text: str) -> None:
    assert fixed(text) == ftfy.fix_text(text)


def test_a_plain_text_does_not_wait_for_ftfy() -> None:
    code = "import sys; from clipkit.text_towers import fixed; fixed('a (red) car, 5 % <b>');"
    code += "print('ftfy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
