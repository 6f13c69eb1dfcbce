"""The catalog: every picture, every place it lies at, its texts and its vectors, in one SQLite file.

Inside an index folder:

    catalog.sqlite      the truth (WAL; numbered migrations in PRAGMA user_version)
    thumbnails.sqlite   derived: may be deleted at any time; a damaged one is created again
    writer.lock         held by the one writer; the system frees it when that process dies
    snapshots/          files of clipkit.index; the catalog only points to the current one

A picture is its content (`image_id`, a hash; `num`, a small integer, inside the index) and has any
number of places (absolute paths). A picture without a place is dead: its rows stay, so that a file
which comes back costs nothing, but no search, filter or count sees it. Paths are `str` as
`os.fsdecode` gives them, stored as bytes: names that are not UTF-8 survive.

catalog.py is the public class; store.py holds the file and the lock, schema.py its tables; filters.py
decides which pictures pass, from the columns in memory of columns.py; texts.py finds phrases and words
and renews what is derived; vectors.py has encoders and vectors, queries.py the other SQL, rows.py the
types. vector_store.py is a file of its own:
vectors that evaluation and training compute once. No other package uses SQL.
"""

from clipkit.catalog.catalog import Catalog
from clipkit.catalog.filters import Filters
from clipkit.catalog.rows import (
    CatalogStats,
    EncoderRow,
    Facets,
    KnownFile,
    Phrase,
    PictureRow,
    SkippedRow,
    SnapshotPointer,
)
from clipkit.catalog.vector_store import VectorStore

__all__ = [
    "Catalog",
    "CatalogStats",
    "EncoderRow",
    "Facets",
    "Filters",
    "KnownFile",
    "Phrase",
    "PictureRow",
    "SkippedRow",
    "SnapshotPointer",
    "VectorStore",
]
