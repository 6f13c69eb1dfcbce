"""Random views of a picture: crops and flips; for learning without captions, colour and blur too.

A view is drawn from the generator it is given alone, so that it depends neither on the number of
threads nor on where a run was taken up again. (torchvision's transforms draw from torch's generator,
which all threads share.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from clipkit.arrays import Float32, Int64
from clipkit.towers import DualEncoder

_RATIO = 4 / 3  # a crop is at most so much wider or narrower than the whole
_JITTERED = 0.8  # share of views with other colours, as in SimCLR
_RADIUS = 6  # pixels of a blur to each side: three times its greatest sigma


class Augment(Protocol):
    """Draws random views, in two steps: of each picture, then of many at a time."""

    def draw(self, image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, Float32]:
        """Return a view, uint8 (3, H, W), and numbers (P,), drawn from `rng`, for `finish`."""

    def finish(self, views: torch.Tensor, drawn: Float32) -> torch.Tensor:
        """Change views, uint8 (N, 3, H, W), on their device, as the numbers (N, P) say.

        Each row of the result, of the same shape and type, depends on its own view alone.
        """


@dataclass(frozen=True, slots=True, eq=False)
class CropAndFlip:
    """A random resized crop that keeps at least `keep` of the picture's area, mirrored half of the time.

    keep: 1 for the picture as at inference.
    """

    encoder: DualEncoder  # for the size and kind of the pictures that its tower takes
    keep: float = 1.0
    flip: bool = True

    def draw(self, image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, Float32]:
        flipped = self.flip and rng.random() < 0.5
        if self.keep < 1:
            config = self.encoder.config
            view = random_view(
                image,
                config.image_size,
                rng,
                keep=self.keep,
                squash=config.resize_mode == "squash",
                interpolation=config.interpolation,
            )
        else:
            view = self.encoder.preprocess(image)
        return view.flip(2) if flipped else view, np.empty(0, np.float32)

    def finish(self, views: torch.Tensor, drawn: Float32) -> torch.Tensor:  # noqa: ARG002
        return views


_CHANGES = 4  # brightness, contrast, saturation, hue
_ORDER, _AMOUNTS, _GREY, _SIGMA = slice(0, 4), slice(4, 8), 8, 9  # what a view's numbers are


@dataclass(frozen=True, slots=True, eq=False)
class StrongView:
    """SimCLR's view (Chen et al. 2020, arXiv 2002.05709, appendix A): crop and flip, other colours in 8
    of 10, grey in 2 of 10, and blur in 5 of 10.

    Colours are changed as torchvision does it, but for many views at a time, and rounded once; a
    view of 256 pixels takes 3.5 ms instead of 5.1 on one core.
    jitter: brightness, contrast and saturation vary by 0.8 of it, hue by 0.2 of it; 0 for none.
    blur: share of blurred views; the paper has none for pictures of 32 pixels.
    """

    crop: CropAndFlip
    jitter: float = 0.5
    grey: float = 0.2
    blur: float = 0.5

    def draw(self, image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, Float32]:
        view, _ = self.crop.draw(image, rng)
        drawn = np.zeros(_SIGMA + 1, np.float32)
        drawn[_ORDER] = -1  # no change
        if rng.random() < _JITTERED and self.jitter:
            change, shift = 0.8 * self.jitter, 0.2 * self.jitter
            drawn[_AMOUNTS] = *rng.uniform(1 - change, 1 + change, 3), rng.uniform(-shift, shift)
            drawn[_ORDER] = rng.permutation(_CHANGES)
        drawn[_GREY] = rng.random() < self.grey
        if rng.random() < self.blur:
            drawn[_SIGMA] = rng.uniform(0.1, 2.0)
        return view, drawn

    def finish(self, views: torch.Tensor, drawn: Float32) -> torch.Tensor:
        pixels = views.float()
        for place in drawn.T[_ORDER]:
            for number, change in enumerate((_brightened, _contrasted, _saturated, _hue_shifted)):
                chosen = np.flatnonzero(place == number)
                _change(pixels, chosen, change, drawn[chosen, _AMOUNTS][:, number])
        chosen = np.flatnonzero(drawn[:, _GREY])
        _change(pixels, chosen, _saturated, np.zeros(len(chosen), np.float32))
        chosen = np.flatnonzero(drawn[:, _SIGMA])
        _change(pixels, chosen, _blurred, drawn[chosen, _SIGMA])
        return pixels.round_().to(torch.uint8)


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # pixels, amounts (N, 1, 1, 1)


def _change(pixels: torch.Tensor, rows: Int64, change: Change, amounts: Float32) -> None:
    """Change some rows of float32 pixels (N, 3, H, W), 0..255, in place."""
    if len(rows):
        where = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        by = torch.from_numpy(amounts).to(pixels.device, non_blocking=True)[:, None, None, None]
        pixels[where] = change(pixels[where], by)


def _brightened(pixels: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return (pixels * by).clamp_(0, 255)


def _contrasted(pixels: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    # A sum of whole numbers is the same in any order, so for any number of threads.
    total = (_grey(pixels) * 256).long().sum((1, 2, 3), keepdim=True)
    mean = total.float() / (256 * pixels[0, 0].numel())
    return torch.lerp(mean, pixels, by).clamp_(0, 255)


def _saturated(pixels: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.lerp(_grey(pixels), pixels, by).clamp_(0, 255)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def _hue_shifted(pixels: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Turn the hue by a share of the circle; value and saturation (HSV) stay."""
    red, green, blue = pixels.unbind(1)
    most, by = pixels.amax(1), by[:, 0]
    range_ = most - pixels.amin(1)
    unit = 1 / range_.clamp(min=1e-3)  # of a grey pixel, any hue will do
    hue = torch.where(
        most == red,
        (green - blue) * unit,
        torch.where(most == green, 2 + (blue - red) * unit, 4 + (red - green) * unit),
    )
    turned = [(n + hue + 6 * by) % 6 for n in (5, 3, 1)]  # in sixths of the circle
    return torch.stack([most - range_ * torch.minimum(c, 4 - c).clamp_(0, 1) for c in turned], 1)


def _blurred(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur by a Gaussian, a dimension at a time; beyond the edge is what is on it."""
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=pixels.device)
    weights = torch.exp(-steps.square() / (2 * sigma.square()))  # (N, 1, 1, taps)
    weights = weights / weights.sum(-1, keepdim=True)
    for dim in (2, 3):
        edges = [_RADIUS * (dim == 3)] * 2 + [_RADIUS * (dim == 2)] * 2
        padded = F.pad(pixels, edges, mode="replicate")
        pixels = torch.zeros_like(pixels)
        for tap, weight in enumerate(weights.unbind(3)):
            pixels.addcmul_(padded.narrow(dim, tap, pixels.shape[dim]), weight[..., None])
    return pixels


def random_view(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    keep: float,
    squash: bool,
    interpolation: Any = "bicubic",
) -> torch.Tensor:
    """Return a random resized crop (Szegedy et al. 2014; torchvision's RandomResizedCrop), on uint8.

    It keeps between `keep` and all of the area and is resized, antialiased, to `size` (height,
    width). Its shape varies around the one that is served: the picture's own if that is squashed,
    else the target's. Gives uint8 (3, H, W).
    """
    width, height = image.size
    target = width / height if squash else size[1] / size[0]
    whole_w, whole_h = min(width, round(height * target)), min(height, round(width / target))
    left, top = (width - max(whole_w, 1)) // 2, (height - max(whole_h, 1)) // 2
    box = (left, top, left + max(whole_w, 1), top + max(whole_h, 1))  # where no crop fits
    for _ in range(10):
        area = rng.uniform(keep, 1.0) * width * height
        ratio = target * _RATIO ** rng.uniform(-1.0, 1.0)
        crop_w, crop_h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            left = int(rng.integers(0, width - crop_w + 1))
            top = int(rng.integers(0, height - crop_h + 1))
            box = (left, top, left + crop_w, top + crop_h)
            break
    pixels = torch.from_numpy(np.array(image.crop(box), np.uint8)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode=interpolation, antialias=True)[0].contiguous()
