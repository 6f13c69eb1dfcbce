"""Random views of a picture: crops and flips, and for learning without captions colour and blur too.

A view is drawn from the generator it is given alone, so that it depends neither on the number of
threads nor on where a run was taken up again. (torchvision's own transforms draw from torch's
generator, which all threads share; its functions, with parameters drawn here, do not.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from clipkit.towers import DualEncoder

_RATIO = 4 / 3  # a crop is at most so much wider or narrower than the whole


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
    """SimCLR's view (Chen et al. 2020, arXiv 2002.05709, appendix A): crop and flip, colour jitter in 8
    of 10, grey in 2 of 10, and blur in 5 of 10.

    strength: of the jitter: brightness, contrast and saturation vary by 0.8 of it, hue by 0.2 of it.
    blur: share of blurred views; 0 for pictures of 32 pixels, as in the paper.
    """

    crop: CropAndFlip
    strength: float = 0.5
    blur: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Draw a view: uint8 (3, H, W)."""
        view = self.crop(image, rng)
        if rng.random() < 0.8:
            view = _jittered(view, rng, self.strength)
        if rng.random() < 0.2:
            view = _functional().rgb_to_grayscale(view, num_output_channels=3)
        if rng.random() < self.blur:
            side = view.shape[-1] // 10 // 2 * 2 + 1  # a tenth of the width, odd
            sigma = float(rng.uniform(0.1, 2.0))
            view = _functional().gaussian_blur(view, [side, side], [sigma, sigma])
        return view


def _jittered(view: torch.Tensor, rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue, in a random order."""
    change, shift = 0.8 * strength, 0.2 * strength
    factors = rng.uniform(max(0.0, 1 - change), 1 + change, 3).tolist()
    hue = float(rng.uniform(-shift, shift))
    functional = _functional()
    for which in rng.permutation(4).tolist():
        if which == 3:
            view = functional.adjust_hue(view, hue)
        else:
            names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
            view = getattr(functional, names[which])(view, factors[which])
    return view


def _functional() -> Any:
    from torchvision.transforms.v2 import functional

    return functional


def random_view(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    keep: float,
    squash: bool,
    interpolation: Any = "bicubic",
) -> torch.Tensor:
    """A random resized crop (Szegedy et al. 2014; torchvision's RandomResizedCrop), on uint8.

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
