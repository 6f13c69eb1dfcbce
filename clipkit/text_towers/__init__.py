"""The text tower of a BERT checkpoint in numpy, for a search that does not wait for torch.

Importing torch, OpenCLIP and transformers takes seconds; a search from the command line encodes one
short text with one small transformer. This module is that forward pass only: `open_text_tower`
returns None for any other architecture, which `towers.load` loads. A test compares its output with
that of the towers.

Source: BERT, arXiv 1810.04805, as in transformers/models/bert/modeling_bert.py, with
open_clip/hf_model.py's mean pooling and projection.
"""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import checkpoint
from clipkit.arrays import Float32, Float64
from clipkit.errors import ModelError

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"

FEW_ROWS = 16  # up to so many, a matrix is multiplied with row by row

# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, within 2e-7: Eigen's and XLA's rational approximation for
# float32, highest power first. SciPy's takes longer to import than a search.
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


@dataclass(frozen=True, slots=True, eq=False)
class TextTower:
    """Encodes texts one at a time: exact, and fast enough for a handful."""

    dim: int
    layers: int
    heads: int
    epsilon: float
    # float32, those of the layers (inputs, outputs); WORD_EMBEDDINGS in the stored dtype
    weights: Mapping[str, npt.NDArray[Any]]
    tokenize: Callable[[str], Sequence[int]]

    def encode_texts(self, texts: Sequence[str]) -> Float32:
        """Encode texts to float32 (N, D), unit rows, equal to `towers.DualEncoder.encode_texts`."""
        rows = [self._encode(self.tokenize(text)) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def _encode(self, tokens: Sequence[int]) -> Float32:
        w = self.weights
        x = w[WORD_EMBEDDINGS][list(tokens)].astype(np.float32)  # (L, width)
        x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            attended = self._linear(self._attend(x, name), f"{name}.attention.output.dense")
            x = self._norm(x + attended, f"{name}.attention.output.LayerNorm")
            inner = _gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._norm(
                x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm"
            )
        row = self._project(x.mean(axis=0))
        return np.asarray(row / np.linalg.norm(row), np.float32)

    def _attend(self, x: Float32, name: str) -> Float32:
        length, width = x.shape
        query, key, value = (
            self._linear(x, f"{name}.attention.self.{part}")
            .reshape(length, self.heads, width // self.heads)
            .transpose(1, 0, 2)  # (heads, L, width / heads)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(width // self.heads)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return np.asarray((scores @ value).transpose(1, 0, 2).reshape(length, width))

    def _linear(self, x: Float32, name: str) -> Float32:
        # A few rows are multiplied one by one, in half of the time that BLAS takes for all of them.
        weight = self.weights[f"{name}.weight"]
        product = np.stack([row @ weight for row in x]) if len(x) <= FEW_ROWS else x @ weight
        return np.asarray(product + self.weights[f"{name}.bias"])

    def _norm(self, x: Float32, name: str) -> Float32:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return np.asarray(x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def _project(self, pooled: Float32) -> Float32:
        w = self.weights
        if "proj.weight" in w:
            return np.asarray(w["proj.weight"] @ pooled)
        return np.asarray(w["proj.2.weight"] @ _gelu(w["proj.0.weight"] @ pooled))


def erf(x: Float32) -> Float32:
    """Return the error function, elementwise."""
    x = np.clip(x, -4, 4)
    square = x * x
    return np.asarray(x * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square), np.float32)


def _polynomial(coefficients: Sequence[float], x: Float32) -> Float64:
    """Evaluate a polynomial, highest power first, as np.polyval does but in one array."""
    value = np.full(x.shape, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value


def _gelu(x: Float32) -> Float32:
    return np.asarray(x * (1 + erf(x * np.float32(0.5**0.5))) / 2)


def open_text_tower(spec: str) -> TextTower | None:
    """Open the text tower of a checkpoint folder or `builtin`; None if it is no such architecture."""
    folder = checkpoint.find_folder(spec)
    if folder is None or not (folder / checkpoint.WEIGHTS_FILE).is_file():
        return None
    text = checkpoint.read_config(folder)[0]["text_cfg"]
    config_file, tokenizer_file = folder / checkpoint.TEXT_CONFIG_FILE, folder / "tokenizer.json"
    if not (config_file.is_file() and tokenizer_file.is_file()) or not _is_plain(text):
        return None
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") != "gelu":
        return None
    prefixes = {"text.transformer.": "", "text.proj.": "proj."}
    weights = {}
    for name, array in checkpoint.read_weights(folder / checkpoint.WEIGHTS_FILE, tuple(prefixes)):
        prefix = next(p for p in prefixes if name.startswith(p))
        short = prefixes[prefix] + name.removeprefix(prefix)
        if short == WORD_EMBEDDINGS:
            # half of a small tower; a query needs a few rows of them
            weights[short] = array.copy()
        elif short.startswith("encoder.") and array.ndim == 2:
            weights[short] = np.ascontiguousarray(array.T, np.float32)
        else:
            weights[short] = array.astype(np.float32)
    return TextTower(
        dim=checkpoint.read_config(folder)[0]["embed_dim"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        epsilon=config.get("layer_norm_eps", 1e-12),
        weights=weights,
        tokenize=_tokenizer(tokenizer_file, text.get("context_length", 77)),
    )


def _is_plain(text: Mapping[str, Any]) -> bool:
    """Tell whether the tower is mean pooling, a bias-free projection and an unmodified tokenizer."""
    return (
        text.get("hf_pooler_type") == "mean_pooler"
        and text.get("hf_proj_type") in ("linear", "mlp")
        and not text.get("tokenizer_kwargs")
        and not text.get("tokenizer_mode")
    )


def _tokenizer(file: Path, context_length: int) -> Callable[[str], Sequence[int]]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(
            f"{file} is not a tokenizer ({error}); copy the checkpoint again"
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(context_length)

    def tokenize(text: str) -> Sequence[int]:
        # open_clip/tokenizer.py, clean="whitespace"
        clean = html.unescape(html.unescape(fixed(text))).strip()
        return list(tokenizer.encode(re.sub(r"\s+", " ", clean).strip()).ids)

    return tokenize


def fixed(text: str) -> str:
    """Return ftfy.fix_text(text), which leaves plain ASCII as it is; importing ftfy takes 45 ms."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return ftfy.fix_text(text)


FEWEST_PIECES = 1_000  # of a script in a vocabulary that was made for a language in it


def unreadable_words(spec: str, texts: Sequence[str]) -> list[str]:
    """Return the words of texts that the model's tokenizer does not know: those with a character that
    is not in its vocabulary, such as an emoji, and those in a script of which it has few pieces.

    An English vocabulary has the letters of most scripts (86 pieces of Cyrillic, 30,000 of Latin), so
    that "пицца" is spelt, not read. Only a WordPiece vocabulary in a checkpoint folder tells this;
    others list bytes. Words of another language in Latin letters cannot be told.
    """
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    words = [word for word in words if not word.isascii()]
    folder = checkpoint.find_folder(spec) if words else None
    vocabulary = _word_pieces(folder / "tokenizer.json") if folder else None
    if vocabulary is None:
        return []
    tokenizer, scripts = vocabulary
    unknown = tokenizer.token_to_id(tokenizer.model.unk_token)
    return [
        word
        for word in words
        if unknown in tokenizer.encode(word, add_special_tokens=False).ids
        or any(char.isalpha() and _script(char) not in scripts for char in word)
    ]


@cache
def _word_pieces(file: Path) -> tuple[Any, frozenset[str]] | None:
    """Return a WordPiece tokenizer and the scripts that it was made for; None for other kinds."""
    from tokenizers import Tokenizer, models

    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))
    if not isinstance(tokenizer.model, models.WordPiece):
        return None
    pieces = (piece.removeprefix("##") for piece in tokenizer.get_vocab())
    counts = Counter(_script(piece[0]) for piece in pieces if piece and piece[0].isalpha())
    return tokenizer, frozenset(script for script, n in counts.items() if n >= FEWEST_PIECES)


def _script(char: str) -> str:
    """Return the first word of a letter's Unicode name, such as "LATIN", "CYRILLIC" or "CJK"."""
    return unicodedata.name(char, "?").split()[0]
