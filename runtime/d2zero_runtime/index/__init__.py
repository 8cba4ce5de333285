"""Indexes: images that were segmented once, to be named with any vocabulary, and searched."""

from d2zero_runtime.index.index import Index, IndexDescription, IndexWriter
from d2zero_runtime.index.search import Match, search
from d2zero_runtime.index.shards import IndexedImage

__all__ = ["Index", "IndexDescription", "IndexWriter", "IndexedImage", "Match", "search"]
