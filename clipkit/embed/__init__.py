"""Folders of pictures -> vectors in the catalog: walk, hash, decode, embed, write.

Threads read, hash, decode and resize (Pillow and torch let go of the interpreter lock there) while
the calling thread runs the image tower on whole batches and writes. Every few seconds the work so
far is committed: a killed run loses no more than that, and the next one goes on from there.

An unchanged file costs one `stat`. A picture is its content: a moved file is a new place of a known
picture and is not embedded again. What cannot be seen is never taken for deleted: a root that is
missing or empty, or a folder that cannot be read, keeps what the catalog knows of it.
"""

from clipkit.embed.progress import Progress, Summary
from clipkit.embed.run import ImageEncoder, index_folders

__all__ = ["ImageEncoder", "Progress", "Summary", "index_folders"]
