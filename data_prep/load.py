"""Load a build's pictures in threads: bytes, identity, perceptual hash, and the file in the pool."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipkit.durable import write_whole
from clipkit.errors import ImageError, InputError
from clipkit.images import Limits, decode, image_id
from clipkit.sources import Picture
from data_prep.clean import Rules, picture_fault
from data_prep.split import perceptual_hash

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
_SUFFIXES |= {"TIFF": ".tiff", "AVIF": ".avif"}  # what others open too; HEIF is written as JPEG
_HASHED_SIDE = 128  # pixels that a picture is decoded to at least: the hash looks at 64
_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a picture was rejected: `reason` is a short word to count by."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A picture that decodes, and its file in the build's pool."""

    image_id: str  # of the source's bytes, also where the file is encoded anew
    look: bytes  # perceptual hash
    width: int  # of the file in the pool
    height: int
    file: str  # its name there


@dataclass(frozen=True, slots=True)
class Loader:
    """Decode one picture and put its file into `pool`; safe to call from any thread.

    `resize` shrinks the shorter side of larger pictures to that many pixels; with `jpeg` every other
    format is encoded as JPEG. Raises InputError if `resize` is below 16.
    """

    pool: Path
    rules: Rules
    limits: Limits
    resize: int | None = None
    jpeg: bool = False

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise InputError(f"--resize is {self.resize}; the minimum is 16 pixels")

    def __call__(self, picture: Picture) -> Loaded | Fault:
        try:
            data = picture.read(self.limits)
            side = max(self.resize or 0, _HASHED_SIDE)
            decoded = decode(data, target=side, limits=self.limits)
        except ImageError as error:
            return Fault(error.reason, str(error))
        size = (decoded.width, decoded.height)
        if fault := picture_fault(decoded.rgb, *size, self.rules):
            return Fault(*fault)
        identity = image_id(data)
        look = perceptual_hash(decoded.rgb)
        smaller = self.resize is not None and min(size) > self.resize
        suffix = _SUFFIXES.get(decoded.format, ".jpg")
        if smaller or decoded.format not in _SUFFIXES or (self.jpeg and suffix != ".jpg"):
            rgb = decoded.rgb if smaller else decode(data, limits=self.limits).rgb
            rgb = _shrunk(rgb, self.resize)
            name = f"{identity}.jpg"
            self._write(name, _jpeg(rgb))
            return Loaded(identity, look, *rgb.size, name)
        name = identity + suffix
        if picture.path is not None:
            self._link(picture.path, name, data)
        else:
            self._write(name, data)
        return Loaded(identity, look, *size, name)

    def _link(self, picture: Path, name: str, data: bytes) -> None:
        try:  # the file itself, where a symbolic link leads to one
            os.link(os.path.realpath(picture), self.pool / name)
        except FileExistsError:
            return
        except OSError:  # another disk, or one without hard links
            self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        goal = self.pool / name
        if goal.exists():
            return
        try:  # two threads may hold the same picture
            write_whole(goal, data, sync=False)
        except OSError as error:
            free = shutil.disk_usage(self.pool).free / 1e9
            raise InputError(
                f"cannot write {goal.name}: {error.strerror}; {free:.1f} GB free there"
            ) from error


def _shrunk(rgb: Image.Image, side: int | None) -> Image.Image:
    """The shorter side `side`, as towers crop squares; never enlarged."""
    scale = side / min(rgb.size) if side else 1.0
    if scale >= 1:
        return rgb
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.BICUBIC)


def _jpeg(rgb: Image.Image) -> bytes:
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=_QUALITY, icc_profile=rgb.info.get("icc_profile"))
    return buffer.getvalue()
