"""Search a catalog by a query: the entry that the page, the API and the command line share.

searcher.py answers and ranks; query_encoder.py encodes a query as one vector; live_vectors.py holds
the catalog's vectors in memory and follows its changes.
"""

from clipkit.search.live_vectors import refresh_snapshot
from clipkit.search.query_encoder import Encoder
from clipkit.search.searcher import Searcher, SearchHit, SearchResult

__all__ = ["Encoder", "SearchHit", "SearchResult", "Searcher", "refresh_snapshot"]
