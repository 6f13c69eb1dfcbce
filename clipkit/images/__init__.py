"""Untrusted bytes -> an upright RGB picture, for training and serving alike.

reading.py decodes; headers.py refuses decompression bombs before anything is opened, exif.py reads
date, camera and orientation. Nothing here imports torch.
"""

from clipkit.images.reading import (
    SUFFIXES,
    Limits,
    Picture,
    decode,
    encode_for_web,
    image_id,
    read_bytes,
    rgb_array,
    thumbnail,
)

__all__ = [
    "SUFFIXES",
    "Limits",
    "Picture",
    "decode",
    "encode_for_web",
    "image_id",
    "read_bytes",
    "rgb_array",
    "thumbnail",
]
