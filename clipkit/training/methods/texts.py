"""Captions alone: each finds another text of its picture among all others of the batch."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.arrays import Float32
from clipkit.errors import DatasetError, InputError
from clipkit.losses.texts import in_batch
from clipkit.training.data import CaptionedPictures, Ints, Plan
from clipkit.training.distributed import collect, gather_uneven, world_size
from clipkit.training.frozen_towers import FeaturesStopped
from clipkit.training.gradient_cache import View, freeze_batch_norms
from clipkit.training.inputs import Batch, Inputs, even_share
from clipkit.training.methods.method import Method, Setup
from clipkit.training.towers import BLOCK
from clipkit.training.validation import Scores, embed_pictures, gathered, of_texts

_NEGATIVES = 5  # the purpose of a random stream, beside seed and epoch; others have 0 to 4
_CHUNK = 1024  # captions searched with at a time
_MOST_OWN = (
    64  # of a caption's hits that are left out; a caption of many pictures has few negatives
)

OnProgress = Callable[[str, int, int], None]


class Texts(Method):
    """Learn from captions alone, of which a batch has one or two of each picture: a query, its passage,
    and perhaps a hard negative, another picture's caption that shares rare words with the query.

    Captions of one meaning, and all captions of a query's own picture, are no negatives of it. The
    picture tower stays as it is; `keep_space` keeps the texts near it.
    Raises DatasetError if two captions of a picture are needed and fewer than two pictures have them.
    """

    sides = frozenset(("text",))
    picture_views = 0

    def __init__(self, setup: Setup, *, captions: int, candidates: int) -> None:
        """captions: how many of each picture in a batch, 1 or 2.

        candidates: of how many of BM25's best a hard negative is drawn; 0 for no hard negatives.
        """
        super().__init__(setup)
        self._captions, self._candidates = captions, candidates
        self._hard: Ints | None = None  # int64 (texts, K), numbers of texts; see `hard_negatives`
        self._start: torch.Tensor | None = None  # float32 (texts, D): the vectors at the start
        self._pictures: Float32 | None = None  # (N, D): the validation split's, which do not change
        pairs = sum(len(owned) > 1 for owned in setup.data.owned)
        if captions > 1 and pairs < 2:
            raise DatasetError(
                f"{pairs} training pictures of {setup.data.folder} have two captions; at least 2 must, "
                "so that a caption can be compared with another one of its picture"
            )

    def prepare(self, inputs: Inputs, on_progress: OnProgress, stop: threading.Event) -> None:
        if self._candidates:
            self._hard = hard_negatives(inputs.data, self._candidates, on_progress, stop)
        if self.setup.options.keep_space:
            self._start = torch.from_numpy(self._texts(inputs, on_progress, stop))

    def plans(
        self,
        inputs: Inputs,
        *,
        epoch: int,
        batch: int,
        searching: Callable[[], None],  # noqa: ARG002
    ) -> Sequence[Plan]:
        seed = self.setup.config.seed
        plans = inputs.data.plans(epoch=epoch, batch=batch, seed=seed, texts=self._captions)
        return plans if self._hard is None else [self._with_negatives(plan) for plan in plans]

    def _with_negatives(self, plan: Plan) -> Plan:
        """Add a row of texts: a hard negative of each query, drawn from its candidates."""
        assert self._hard is not None
        stream = [self.setup.config.seed, _NEGATIVES, plan.epoch, plan.number]
        candidates = self._hard[plan.texts[0]]
        counts = np.maximum(1, (candidates >= 0).sum(1))
        drawn = np.random.default_rng(stream).integers(0, counts)
        negatives = candidates[np.arange(len(candidates)), drawn]
        # A query without a candidate brings itself: a negative of the others, and none of its own.
        negatives = np.where(negatives < 0, plan.texts[0], negatives)
        return replace(plan, texts=np.concatenate([plan.texts, negatives[None]]))

    def views(self, batch: Batch) -> Sequence[View]:
        encode = self.setup.towers.texts
        columns = zip(batch.texts, batch.text_orders, strict=True)
        return [View(encode, tokens, side="text", order=order) for tokens, order in columns]

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        queries, passages = rows[0], torch.cat(list(rows[1:]))
        texts = batch.plan.texts
        # Two passes of one row of texts make two columns.
        texts = texts[1:] if len(texts) == len(rows) else texts
        left_out = no_negatives(batch.data, batch.plan.pictures, np.concatenate(texts))
        value = in_batch(
            queries,
            passages,
            temperature=self.setup.options.temperature,
            left_out=left_out.to(queries.device),
        )
        if self._start is not None:
            start = self._start[torch.from_numpy(batch.plan.texts[0])].to(queries)
            apart = 1 - (queries * start).sum(1).mean()
            value = value + self.setup.options.keep_space * apart
        return value

    def evaluate(self, inputs: Inputs) -> Scores:
        if self._pictures is None:
            self._pictures = embed_pictures(self.setup.towers, inputs)
        return of_texts(self.setup.towers, inputs, self._pictures)

    def _texts(self, inputs: Inputs, on_progress: OnProgress, stop: threading.Event) -> Float32:
        """Encode all distinct captions: float32 unit rows (texts, D)."""
        towers, total = self.setup.towers, len(inputs.data.texts)

        def encoded() -> Iterator[torch.Tensor]:
            done = 0
            for tokens in inputs.captions():
                yield towers.texts(tokens)
                done += len(tokens)
                on_progress("captions", done, total)
                if stop.is_set() and world_size() == 1:  # others would wait for this one
                    raise FeaturesStopped

        towers.mode(False)
        with torch.no_grad():
            return gathered(encoded(), inputs.data)


class SimCse(Texts):
    """Learn by SimCSE: a caption passes the tower twice, with different dropout, or beside another
    caption of its picture, perhaps with a hard negative."""

    def __init__(self, setup: Setup) -> None:
        kind = setup.options.captions
        captions = 1 if kind == "dropout" else 2
        candidates = _CANDIDATES if kind == "triplet" else 0
        super().__init__(setup, captions=captions, candidates=candidates)
        self._dropout = TextDropout(setup.towers.model, setup.options.dropout_rate)

    def views(self, batch: Batch) -> Sequence[View]:
        self._dropout.start()
        views = super().views(batch)
        return [*views, *views] if len(views) == 1 else views


_CANDIDATES = 30  # of which a triplet's negative is drawn


class Passages(Texts):
    """Learn as DPR does, with one tower for both: a caption, the query, finds another one of its
    picture, the passage, among all passages and hard negatives of the batch."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, captions=2, candidates=setup.options.bm25_negatives)


class TextDropout:
    """Dropout in a text tower, from `start` until the towers' mode is set the next time.

    rate: of every dropout layer of the tower, as in BERT; in a tower without any, of what each of its
    blocks adds to its input. 0 for none.
    """

    def __init__(self, model: torch.nn.Module, rate: float) -> None:
        self._model, self._rate = model, rate
        named = [(n, m) for n, m in model.named_modules() if n and n.split(".")[0] != "visual"]
        self._modules = [module for _, module in named]
        layers = [module for module in self._modules if isinstance(module, torch.nn.Dropout)]
        for layer in layers:
            layer.p = rate
        if not layers:
            for name, module in named:
                if (match := BLOCK.search(name)) and match.end() == len(name):
                    module.register_forward_hook(self._drop)

    def start(self) -> None:
        """Put the text tower into training mode."""
        for module in self._modules if self._rate else ():
            module.training = True
        freeze_batch_norms(self._model)

    def _drop(self, block: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not block.training:
            return output
        return inputs[0] + F.dropout(output - inputs[0], self._rate)


def hard_negatives(
    data: CaptionedPictures, count: int, on_progress: OnProgress, stop: threading.Event
) -> Ints:
    """Return int64 (texts, count): for each distinct caption, others that share rare words with it
    (BM25; Robertson & Zaragoza 2009), best first; -1 if there are fewer.

    None is of a picture that has the caption, or means the same as one that is. All processes share the
    search. Raises InputError without bm25s, FeaturesStopped once `stop` is set.
    """
    bm25s = _bm25s()
    own = _own_meanings(data)
    tokens = bm25s.tokenize(list(data.texts), stopwords=None, return_ids=False, show_progress=False)
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    alike = np.bincount(data.meanings)  # texts of each meaning
    most = max(int(alike[list(meanings)].sum()) for meanings in own)  # texts that are no negatives
    depth = min(len(data.texts), count + min(_MOST_OWN, most))
    result = np.full((len(data.texts), count), -1, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        part = range(len(tokens))[start : start + _CHUNK]
        share = part[even_share(len(part))]
        rows = np.full((len(share), count), -1, np.int64)
        if share:
            queries = [tokens[number] for number in share]
            found, scores = index.retrieve(
                queries, k=depth, show_progress=False, backend_selection="numpy"
            )  # JAX, where it is installed, would take a GPU's memory
            for row, number, texts, having in zip(rows, share, found, scores > 0, strict=True):
                others = [t for t in texts[having] if int(data.meanings[t]) not in own[number]]
                row[: len(others)] = others[:count]
        result[part.start : part.stop] = gather_uneven(torch.from_numpy(rows)).numpy()
        on_progress("hard negatives", part.stop, len(tokens))
        if any(collect(stop.is_set())):
            raise FeaturesStopped
    return result


def _bm25s() -> Any:
    try:
        return importlib.import_module("bm25s")
    except ImportError:
        raise InputError(
            "hard negatives need bm25s: pip install 'clipkit[passages]', or leave them out: "
            "--method passages --bm25-negatives 0, --method simcse --captions other"
        ) from None


def _own_meanings(data: CaptionedPictures) -> list[set[int]]:
    """Return, for each text, the meanings of all captions of the pictures that have its meaning."""
    of_meaning: dict[int, set[int]] = {}
    for owned in data.owned:
        meanings = {int(data.meanings[number]) for number in owned}
        for meaning in meanings:
            of_meaning.setdefault(meaning, set()).update(meanings)
    return [of_meaning.get(int(meaning), {int(meaning)}) for meaning in data.meanings]


def no_negatives(data: CaptionedPictures, pictures: Ints, texts: Ints) -> torch.Tensor:
    """Return int64 (P, 2): the pairs (i, j), but (i, i), in which text j has the meaning of a caption of
    picture i. pictures (B,) and texts (N,) are numbers in `data`."""
    columns: dict[int, list[int]] = {}
    for j, text in enumerate(texts):
        columns.setdefault(int(data.meanings[text]), []).append(j)
    pairs = [
        (i, j)
        for i, picture in enumerate(pictures)
        for meaning in {int(data.meanings[text]) for text in data.owned[picture]}
        for j in columns.get(meaning, ())
        if i != j
    ]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
