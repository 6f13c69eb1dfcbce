"""Search a catalog by a query: the entry that the page, the API and the command line share.

searcher.py answers and ranks; query_encoder.py encodes a query as one vector; live_vectors.py holds
the catalog's vectors in memory and follows its changes.
"""

from clipkit.search.searcher import Searcher, SearchHit, SearchResult

__all__ = ["SearchHit", "SearchResult", "Searcher"]
