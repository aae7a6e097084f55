"""Measurements, never assertions: each prints ratios against a reference of the same run."""
