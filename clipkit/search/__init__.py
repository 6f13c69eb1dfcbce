"""Query -> hits: the one entry that the page, the API and the command line share.

searcher.py answers; query_encoder.py makes a query one vector, live_vectors.py holds the catalog's
vectors in memory and follows it, ranking.py fuses rankings and calls hits strong, fair or weak.
"""

from clipkit.search.searcher import Searcher, SearchHit, SearchResult

__all__ = ["SearchHit", "SearchResult", "Searcher"]
