"""Training data: rows of token shards, their order, and the loader. Knows ranks only as plain integers."""
