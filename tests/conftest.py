"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import settings

from tests.distributed.ranks import REPOSITORY, RankPool

settings.register_profile("athanor", deadline=None)  # no timed assertions, those of examples included
settings.load_profile("athanor")

LARGEST_KEPT_POOL = 2  # ranks
MOST_TASKS_OF_A_KEPT_POOL = 60

_LAST_START = pytest.StashKey[float | None]()  # of slow tests, on the monotonic clock


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-within",
        type=float,
        metavar="MINUTES",
        help="start slow tests (they run last) in the first MINUTES of the run only; the rest are skipped by name",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # stable: the others keep their order


def pytest_sessionstart(session: pytest.Session) -> None:
    minutes = session.config.getoption("--slow-within")
    session.config.stash[_LAST_START] = None if minutes is None else time.monotonic() + 60 * minutes


def pytest_runtest_setup(item: pytest.Item) -> None:
    last_start = item.config.stash[_LAST_START]
    if last_start is not None and item.get_closest_marker("slow") and time.monotonic() > last_start:
        pytest.skip("slow tests had no more time in this run (--slow-within)")


@pytest.fixture(scope="session")
def _rank_pools() -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def rank_pool(_rank_pools: dict[int, RankPool]) -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(2)` is the session's pool of 2 gloo processes; it starts at its first use.

    After each file large and long-used pools end, and start anew when they are next asked for: a rank takes half a GiB,
    and one more MiB with every engine, and what one file's pools keep lay beside all later tests.
    """

    def pool_of(world_size: int) -> RankPool:
        return _rank_pools.setdefault(world_size, RankPool(world_size))

    yield pool_of
    for pool in _rank_pools.values():
        if pool.world_size > LARGEST_KEPT_POOL or pool.tasks > MOST_TASKS_OF_A_KEPT_POOL:
            pool.close()


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset (rows of 64 tokens, 512 tokens of vocabulary) of a few documents that ship with the project."""
    folder = tmp_path_factory.mktemp("tiny-dataset")
    with gzip.open(REPOSITORY / "launch/corpus/documents.jsonl.gz", "rt", encoding="utf-8") as corpus:
        (folder / "documents.jsonl").write_text("".join(islice(corpus, 40)), encoding="utf-8")
    for words in (
        "train-tokenizer documents.jsonl --vocab-size 512 --output tokenizer",
        "prepare documents.jsonl --tokenizer tokenizer --output tokens --split 0.8,0.2,0",
        "pack tokens --sequence-length 64 --output packed",
    ):
        command = [sys.executable, "-m", "data_tools", *words.split()]
        subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL, timeout=120)
    return folder / "packed"
