"""A sheet of some training pictures beside the views of them that a run would train on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clipkit.errors import InputError
from clipkit.towers import load
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.inputs import Batch, PictureInputs, readable_batch
from clipkit.training.registry import METHODS
from clipkit.training.run import make_method
from clipkit.training.towers import TrainableTowers, loss_of

_TILE, _GAP, _HEAD = 144, 8, 24  # pixels
_PAPER, _INK = "#ffffff", "#404650"


def draw_views(config: TrainConfig, *, pictures: int = 8, epochs: int = 3) -> Image.Image:
    """Draw the first `pictures` of a run's first epoch, each as it is searched and its views of some
    epochs.

    The views of one epoch are what a method compares. Raises InputError for a recipe or a method that
    has no views of pictures, and what a run raises for its data and its model.
    """
    if config.recipe == "heads":
        raise InputError(
            "recipe heads trains on features of whole pictures: there are no views to show; use "
            "another recipe"
        )
    entry, encoder = METHODS[config.method], load(config.start, device="cpu", precision="float32")
    data = CaptionedPictures.read(Path(config.data), "train", needs=entry.needs)
    loss = loss_of(encoder, config.loss, entry.losses)
    towers, count = TrainableTowers(encoder, loss=loss), min(pictures, len(data))
    method = make_method(config, loss, towers, data, max(2, count))
    if not method.picture_views:
        raise InputError(f"method {config.method} uses no pictures: there are no views to show")
    inputs = PictureInputs(
        data,
        towers,
        augment=method.augment(),
        views=method.picture_views,
        seed=config.seed,
        workers=config.workers,
    )
    chosen = data.order(0, config.seed)[:count]
    first = readable_batch(inputs, Plan(0, 0, chosen, np.empty((0, count), np.int64)))
    later = inputs.stream([replace(first.plan, epoch=epoch) for epoch in range(1, epochs)])
    columns = {
        "as searched": [inputs.served(inputs.read(picture)) for picture in first.plan.pictures]
    }
    for epoch, batch in enumerate([first, *later], 1):
        assert isinstance(batch, Batch)
        for number, view in enumerate(batch.pictures, 1):
            columns[f"epoch {epoch}, view {number}"] = list(view[torch.arange(count)])
    return _sheet(columns)


def _sheet(columns: dict[str, list[torch.Tensor]]) -> Image.Image:
    """Lay out columns of uint8 (3, H, W) under their titles."""
    step, rows = _TILE + _GAP, max(map(len, columns.values()))
    sheet = Image.new("RGB", (len(columns) * step + _GAP, _HEAD + rows * step), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for x, (title, views) in enumerate(columns.items()):
        left = _GAP + x * step
        draw.text((left, 5), title, fill=_INK, font=font)
        for y, view in enumerate(views):
            tile = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
            factor = _TILE / max(tile.size)
            size = (round(tile.width * factor), round(tile.height * factor))
            kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            sheet.paste(tile.resize(size, kind), (left, _HEAD + y * step))
    return sheet
