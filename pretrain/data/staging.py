"""Brings the datasets of a run that lie behind URLs to this node before any is opened: one rank a node fetches.

Fetching, verifying and evicting are data_tools'; what training reads are local files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread

from data_tools.token_shards import DataToolsError, StagedDataset, is_url, stage_dataset
from pretrain.config_data import DataSection
from pretrain.errors import DataError, Problem

AGREE_EVERY_SECONDS = 2.0  # a failure is known everywhere after so long; well below the process group's time limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StagedData:
    """Where the datasets behind URLs lie on this node; nobody evicts them while this object lives."""

    folders: Mapping[str, Path] = field(default_factory=dict)
    leases: tuple[StagedDataset, ...] = ()

    def local(self, path: str) -> str:
        """Return the folder of a dataset that may be behind a URL."""
        return str(self.folders.get(path, path))


class _GivenUpError(Exception):
    """Another rank has failed."""


@dataclass(kw_only=True)
class _Fetching:
    """What the fetching thread of a node has done so far."""

    staged: dict[str, StagedDataset] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    give_up: Event = field(default_factory=Event)

    def run(self, wanted: Mapping[str, tuple[str, ...]], data: DataSection) -> None:
        for url, splits in wanted.items():
            try:
                self.staged[url] = _stage(url, splits, data, self.give_up)
            except DataToolsError as error:
                self.problems.append(Problem(error.found, error.allowed, error.change))
            except OSError as error:
                change = "free space, mend permissions, or choose another data.cache; what came is kept"
                self.problems.append(Problem(f"{url} cannot be staged ({error})", "a cache with room", change))
            except _GivenUpError:
                return
            except Exception as error:  # it would be lost with the thread, and all ranks would wait
                logger.exception("staging %s failed", url)
                self.problems.append(Problem(f"{url} cannot be staged ({error!r})", "no such fault", "report it"))


def stage_remote(data: DataSection) -> StagedData:
    """Stage every dataset that is named by a URL into `data.cache`. Every rank must call.

    Raises:
        DataError: on all ranks, where staging failed on any node.
    """
    wanted = _wanted(data)
    if not wanted:
        return StagedData()
    if data.cache is None:
        found = f"{next(iter(wanted))} is a URL, and there is no data.cache"
        raise DataError(Problem(found, "a folder on a local disk of each node", "set data.cache=FOLDER"))
    from pretrain import distributed  # loads torch, for which a run of local files would wait before it is checked

    fetching = _Fetching()
    is_fetcher = distributed.read_place().local_rank == 0
    thread = Thread(target=fetching.run, args=(wanted, data), name="staging", daemon=True)
    if is_fetcher:
        thread.start()
    while True:
        if is_fetcher:
            thread.join(AGREE_EVERY_SECONDS)
        told = distributed.gather_json(
            {
                "done": not thread.is_alive(),
                "problems": [asdict(problem) for problem in fetching.problems],
                "folders": {url: str(staged.folder) for url, staged in fetching.staged.items()},
            }
        )
        if problems := list(dict.fromkeys(Problem(**problem) for rank in told for problem in rank["problems"])):
            fetching.give_up.set()
            raise DataError(*problems)
        if all(rank["done"] for rank in told):
            break
    folders = _agreed([rank["folders"] for rank in told if rank["folders"]])
    return StagedData(folders=folders, leases=tuple(fetching.staged.values()))


def _wanted(data: DataSection) -> dict[str, tuple[str, ...]]:
    """URL -> the splits of it that are read."""
    wanted: dict[str, tuple[str, ...]] = {}
    pairs = [(source.path, "train") for source in data.sources]
    pairs += [(path, "validation") for path in data.validation.values()]
    for path, split in pairs:
        if is_url(path) and split not in wanted.get(path, ()):
            wanted[path] = (*wanted.get(path, ()), split)
    return wanted


def _stage(url: str, splits: tuple[str, ...], data: DataSection, give_up: Event) -> StagedDataset:
    assert data.cache is not None
    fetched, next_share = 0, 0.1

    def on_progress(count: int, total: int) -> None:
        nonlocal next_share, fetched
        if give_up.is_set():
            raise _GivenUpError
        fetched += count
        if fetched >= next_share * total:
            logger.info("staging %s: %.0f%% of %.2f GB", url, 100 * fetched / total, total / 1e9)
            next_share = fetched / total + 0.1

    staged = stage_dataset(url, data.cache, splits=splits, max_bytes=data.cache_max_bytes, on_progress=on_progress)
    logger.info("%s is in %s (%d bytes fetched)", url, staged.folder, staged.fetched_bytes)
    return staged


def _agreed(folders: list[dict[str, str]]) -> dict[str, Path]:
    """Return the folders that all nodes have; their names depend on the content."""
    if any(other != folders[0] for other in folders):
        found = "a dataset behind a URL changed while the nodes staged it: they have different content"
        raise DataError(Problem(found, "the same data on all nodes", "start again when nobody writes to the URL"))
    return {url: Path(folder) for url, folder in folders[0].items()}
