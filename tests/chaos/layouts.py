"""The runs under test: one tiny model, on every way to share its work, and the copies that cases do harm to.

Says what a run is; reading its results is results.py's.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tests.distributed.ranks import REPOSITORY
from tests.launch.jobs import write_tiny_run

TOTAL_STEPS = 14
SAVE_EVERY, EVALUATE_EVERY = 3, 4  # so that saves of either kind, and of both, occur
STOPPED_AT = 8  # where the copies that many cases start from stand: an evaluation is due, and its save is the best yet
KEPT = 3  # checkpoints


@dataclass(frozen=True)
class Layout:
    """One way to run."""

    name: str
    ranks: int
    overrides: tuple[str, ...]
    share: int  # of the cases; the cheap ones have more


LAYOUTS = (
    Layout("plain", 1, ("parallel.engine=plain",), 12),
    Layout("ZeRO 1 x 2", 2, ("parallel.engine=zero", "parallel.zero_stage=1"), 3),
    Layout("ZeRO 2 x 2", 2, ("parallel.engine=zero", "parallel.zero_stage=2"), 3),
    Layout("ZeRO 3 x 2", 2, ("parallel.engine=zero", "parallel.zero_stage=3"), 2),
    Layout("pipeline 2", 2, ("parallel.pipeline=2",), 2),
    Layout("DDP 2", 2, ("parallel.engine=accelerate",), 1),
    Layout("FSDP2 x 2", 2, ("parallel.engine=accelerate", "parallel.data_parallel=shard"), 1),
)


def write_run(folder: Path, dataset: Path) -> Path:
    """The run configuration of a case; its run folder is `run` beside it."""
    return write_tiny_run(
        folder / "run.yaml",
        data=dataset,
        schedule={"name": "cosine", "warmup_steps": 2, "total_steps": TOTAL_STEPS},
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": KEPT},
        evaluation={"every_steps": EVALUATE_EVERY, "max_rows": 8},
    )


def training_words(layout: Layout, run: Path, *more: str) -> Sequence[str]:
    """The command line of a start, after `pretrain`."""
    return ["train", str(run), *layout.overrides, *more]


def make_dataset(folder: Path) -> Path:
    """A packed dataset (rows of 64 tokens, 512 tokens of vocabulary) of a few documents that ship with the project."""
    packed = folder / "packed"
    if packed.exists():
        return packed
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(REPOSITORY / "launch/corpus/documents.jsonl.gz", "rt", encoding="utf-8") as corpus:
        (folder / "documents.jsonl").write_text("".join(islice(corpus, 40)), encoding="utf-8")
    for words in (
        "train-tokenizer documents.jsonl --vocab-size 512 --output tokenizer",
        "prepare documents.jsonl --tokenizer tokenizer --output tokens --split 0.8,0.2,0",
        "pack tokens --sequence-length 64 --output packed",
    ):
        command = [sys.executable, "-m", "data_tools", *words.split()]
        subprocess.run(
            command, cwd=folder, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=300
        )
    return packed
