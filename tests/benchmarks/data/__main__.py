"""`python -m tests.benchmarks.data [encoding] [gigatoken] [memory] [reading]`: what was measured and what was wanted.

Corpus and tokenizer are built below --folder, which must lie outside the checkout (corpus.py says of what).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from tests.benchmarks.data.corpus import build_corpus, build_gpt2, versions
from tests.benchmarks.data.encoding_speed import corpora_of, measure_encoding, measure_fast_encoding, measure_memory
from tests.benchmarks.data.measure import Table

PARTS = ("encoding", "gigatoken", "memory", "reading")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--folder", type=Path, required=True, help="for corpora, tokenizer and scratch files")
    parser.add_argument("--corpus", type=Path, help="JSON lines; default: made of Debian's documentation packages")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: GPT-2's")
    parser.add_argument("--megabytes", type=float, default=100, help="of the corpus for all programs with tokenizers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    words = parser.parse_args()
    unknown = set(words.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    folder = words.folder.resolve()
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    parts = words.parts or PARTS
    sys.stdout.write(f"{versions()}; load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores\n\n")
    table = Table()
    table.head()
    if {"encoding", "gigatoken", "memory"} & set(parts):
        corpus = words.corpus or build_corpus(folder)
        tokenizer = words.tokenizer or build_gpt2(folder)
        if "encoding" in parts:
            (part,) = corpora_of([words.megabytes], corpus, folder)
            measure_encoding(
                table,
                part,
                tokenizer,
                scratch,
                rounds=words.rounds,
                workers=words.workers,
                megatron=words.megatron and words.megatron.resolve(),
            )
        if "gigatoken" in parts:
            measure_fast_encoding(table, corpus, tokenizer, scratch, rounds=words.rounds, workers=words.workers)
        if "memory" in parts:
            small, large = corpora_of([100, 300], corpus, folder)
            measure_memory(table, small, large, tokenizer, scratch, workers=words.workers)
    if "reading" in parts:
        from tests.benchmarks.data.reading_speed import measure_reading

        measure_reading(table, scratch)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
