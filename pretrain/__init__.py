"""Athanor's training package: from verified token shards to checkpoints and a Hugging Face model."""
