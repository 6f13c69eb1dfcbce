"""Pictures -> vectors: walk folders, one pass over files, and the indexing run that fills a catalog.

walk.py lists the pictures below a folder, pictures.py is the pass (read once, hash, look up, decode,
encode) that evaluation and training run too, run.py the indexing run, streams.py its work lists.

Every few seconds the work is committed: a killed run loses no more than that, and the next one goes
on from there. An unchanged file costs one `stat`. A picture is its content: a moved file is a new
place of a known picture and is not encoded again. A root that is missing or empty, a folder that
cannot be read, or a run that is stopped deletes nothing from the catalog. Memory grows neither with
the library nor with the number of threads.
"""

from clipkit.embed.pictures import (
    DECODED_MEGAPIXELS,
    Budget,
    Encoded,
    Known,
    Unreadable,
    ahead,
    encode_pictures,
    in_order,
)
from clipkit.embed.run import Progress, Summary, index_folders
from clipkit.embed.walk import distinct_roots, walk

__all__ = [
    "DECODED_MEGAPIXELS",
    "Budget",
    "Encoded",
    "Known",
    "Progress",
    "Summary",
    "Unreadable",
    "ahead",
    "distinct_roots",
    "encode_pictures",
    "in_order",
    "index_folders",
    "walk",
]
