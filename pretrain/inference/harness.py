"""Tasks of lm-evaluation-harness: found by name, run on a model, and what they found as numbers and as lm_eval's table.

Owns the use of the package lm_eval (extra `eval`); the model it asks is harness_model.py's. Needs no network for tasks
whose data is local.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from pretrain.inference.harness_model import HarnessModel

SEED = 1234  # of few-shot examples; lm_eval's own default
BOOTSTRAPS = 100_000  # lm_eval's own default
NAMES_SHOWN = 8
PREFIX = "tasks"  # of the names of results


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Which tasks, and how much of them."""

    names: Sequence[str]  # of tasks, groups and tags of lm_eval and of the folder, or files
    folder: Path | None = None  # with task files of one's own, which may run code that lies beside them
    documents: int | None = None  # the first ones of each task; null: all
    shots: int | None = None  # examples before each question; null: as the task says


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Loaded tasks."""

    loaded: Any  # lm_eval's dictionary of tasks and groups
    request: TaskRequest

    @property
    def generating(self) -> list[str]:
        """Names of those that need text to be generated."""
        return [name for name, task in self.loaded["tasks"].items() if "generate" in str(task.OUTPUT_TYPE)]

    @property
    def metrics(self) -> list[str]:
        """Names of the values that the tasks will have; those of groups come only with results."""
        return sorted(
            f"{PREFIX}/{name}/{metric}" for name, task in self.loaded["tasks"].items() for metric in task.aggregation()
        )


def load_tasks(request: TaskRequest) -> Tasks:
    """Find tasks and read their data.

    Raises:
        ConfigError: lm_eval is not installed, or a name is unknown.
        DataError: a task's data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        change = "pip install -c constraints.txt -e '.[eval]'"
        raise ConfigError(
            Problem("tasks are asked for, and the package lm_eval is not installed", "extra eval", change)
        )
    if request.folder is not None and not request.folder.is_dir():
        raise ConfigError(Problem(f"{request.folder} is not a folder", "a folder of task files", "check the path"))
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its own command line
    folder = None if request.folder is None else str(request.folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not _are_known(request.names, manager.all_tasks):  # reading lm_eval's own thousands of files takes a while
        manager = TaskManager(include_path=folder)
    if problems := list(_unknown(request.names, manager.all_tasks)):
        raise ConfigError(*problems)
    try:
        return Tasks(loaded=manager.load(list(request.names)), request=request)
    except Exception as error:  # whatever a task's own code and data raise
        said = str(error).strip().splitlines() or [""]
        raise DataError(
            Problem(
                f"{', '.join(request.names)}: cannot be loaded ({type(error).__name__}: {said[0]})",
                "tasks whose data is on this machine, or can be fetched",
                "look at the task's file (dataset_path, data_files), or allow the network (HF_HUB_OFFLINE=0)",
            )
        ) from error


def run_tasks(tasks: Tasks, model: HarnessModel, *, bootstraps: int = BOOTSTRAPS) -> dict[str, Any]:
    """lm_eval's results; no state of this process's random numbers is touched.

    `bootstraps`: resamplings behind some metrics' standard errors, for which lm_eval forks processes; 0: no standard
    errors, where forking is not safe.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if given is None or (tasks.request.shots is not None and given != 0):
            task.set_config(key="num_fewshot", value=tasks.request.shots or 0)
        task.set_fewshot_seed(seed=SEED)
    results = evaluate(
        lm=model,
        task_dict=tasks.loaded,
        limit=tasks.request.documents,
        bootstrap_iters=bootstraps,
        log_samples=False,
    )
    assert results is not None, "the one process that runs it is the first"
    return dict(results)


def result_values(results: Mapping[str, Any]) -> dict[str, float]:
    """tasks/NAME/METRIC -> value, standard errors beside it; a filter other than the usual one is in the name."""
    values: dict[str, float] = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, used_filter = key.partition(",")
            if comma and isinstance(value, int | float):
                suffix = "" if used_filter == "none" else f"/{used_filter}"
                values[f"{PREFIX}/{task}/{metric}{suffix}"] = float(value)
    return values


def result_table(results: Mapping[str, Any]) -> str:
    """lm_eval's own table, groups below."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(str(table) for table in tables)


def _are_known(names: Sequence[str], known: Sequence[str]) -> bool:
    return not list(_unknown(names, known))


def _unknown(names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
    if not names:
        yield Problem("no task", "one or more", "give --tasks NAME,NAME")
    for name in names:
        if name in known or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            continue
        near = difflib.get_close_matches(name, known, n=NAMES_SHOWN, cutoff=0.5)
        allowed = ", ".join(near) if near else f"one of {len(known)} names, or a task file"
        yield Problem(f"task {name!r} is not known", allowed, "correct the name, or give --task-folder FOLDER")
