"""Untrusted bytes -> an upright RGB picture. The one place for it, shared by training and serving.

reading.py is the way in; headers.py looks for bombs before anything decodes, pixels.py brings every
mode to RGB on white, exif.py reads date, camera and orientation. No torch here.
"""

from clipkit.images.reading import (
    SUFFIXES,
    Limits,
    Picture,
    decode,
    encode_for_web,
    image_id,
    read_bytes,
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
    "thumbnail",
]
