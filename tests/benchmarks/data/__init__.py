"""Benchmarks of the data tools: speed, memory and latency as ratios to a reference of the same run.

No test is here; run `python -m tests.benchmarks.data --help`.
"""
