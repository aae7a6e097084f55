"""Checkpoints: logical state in fragments, written atomically, verified when read."""
