"""Athanor's data package: from corpora to packed, verified, memmapped token shards."""
