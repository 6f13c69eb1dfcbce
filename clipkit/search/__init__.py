"""Search a catalog by a query: the entry that the page, the API and the command line share.

searcher.py answers and ranks; query_encoder.py encodes a query as one vector; live_vectors.py holds
the catalog's vectors in memory and follows its changes; name_matches.py looks for the words in names;
empty.py says why nothing passes.
"""

from clipkit.search.empty import Empty, Offer
from clipkit.search.searcher import Searcher, SearchHit, SearchResult

__all__ = ["Empty", "Offer", "SearchHit", "SearchResult", "Searcher"]
