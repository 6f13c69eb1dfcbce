"""Random views of a picture: crops and flips; for learning without captions, colour and blur too.

A view is drawn from the generator it is given alone, so that it depends neither on the number of
threads nor on where a run was taken up again. (torchvision's transforms draw from torch's generator,
which all threads share; its functions, with parameters drawn here, do not.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torchvision.transforms.v2 import functional

from clipkit.towers import DualEncoder

_RATIO = 4 / 3  # a crop is at most so much wider or narrower than the whole
_JITTERED = 0.8  # share of views with other colours, as in SimCLR


@dataclass(frozen=True, slots=True, eq=False)
class CropAndFlip:
    """A random resized crop that keeps at least `keep` of the picture's area, mirrored half of the time.

    keep: 1 for the picture as at inference.
    """

    encoder: DualEncoder  # for the size and kind of the pictures that its tower takes
    keep: float = 1.0
    flip: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Draw a view: uint8 (3, H, W)."""
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
        return view.flip(2) if flipped else view


@dataclass(frozen=True, slots=True, eq=False)
class StrongView:
    """SimCLR's view (Chen et al. 2020, arXiv 2002.05709, appendix A): crop and flip, other colours in 8
    of 10, grey in 2 of 10, and blur in 5 of 10.

    jitter: brightness, contrast and saturation vary by 0.8 of it, hue by 0.2 of it; 0 for none.
    blur: share of blurred views; the paper has none for pictures of 32 pixels.
    """

    crop: CropAndFlip
    jitter: float = 0.5
    grey: float = 0.2
    blur: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Draw a view: uint8 (3, H, W)."""
        view = self.crop(image, rng)
        if rng.random() < _JITTERED and self.jitter:
            view = _jittered(view, rng, self.jitter)
        if rng.random() < self.grey:
            view = functional.rgb_to_grayscale(view, num_output_channels=3)
        if rng.random() < self.blur:
            side = view.shape[-1] // 10 // 2 * 2 + 1  # about a tenth of the width, odd
            sigma = float(rng.uniform(0.1, 2.0))
            view = functional.gaussian_blur(view, [side, side], [sigma, sigma])
        return view


def _jittered(view: torch.Tensor, rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue, in a random order."""
    change, shift = 0.8 * strength, 0.2 * strength
    brightness, contrast, saturation = rng.uniform(1 - change, 1 + change, 3).tolist()
    hue = float(rng.uniform(-shift, shift))
    changes = [
        lambda view: functional.adjust_brightness(view, brightness),
        lambda view: functional.adjust_contrast(view, contrast),
        lambda view: functional.adjust_saturation(view, saturation),
        lambda view: functional.adjust_hue(view, hue),
    ]
    for which in rng.permutation(len(changes)):
        view = changes[which](view)
    return view


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
