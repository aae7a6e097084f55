"""From a recipe to cleaned documents with a report: plans, runs the stages, publishes; a stopped run goes on.

The parts do the work (curation/); this file owns their order, and what an unchanged rerun need not do again.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from data_tools.corpus import input_facts
from data_tools.curation.finish import Ending, finish
from data_tools.curation.recipe import Decontamination, Recipe
from data_tools.curation.stages import Stage, StagePlan
from data_tools.curation.workplace import finished_result, own_work_folder, work_folder
from data_tools.errors import UsageError
from data_tools.input_files import find_inputs
from data_tools.pieces import Piece
from data_tools.ranges import Task, plan_tasks

if TYPE_CHECKING:
    from data_tools.curation.cluster import ClusterJob

TASK_BYTES = 1 << 26
VERSION = 1  # of what the steps do: a change here makes earlier work and results another job's
_PACKAGES = ("datatrove", "ftfy", "py3langid", "regex")


@dataclass(frozen=True, kw_only=True)
class Curation:
    """A recipe with its files found and its work cut in tasks."""

    recipe: Recipe
    output: Path
    tasks: Sequence[Task]
    evaluation: dict[int, list[Piece]]
    facts: dict[str, Any]  # what decides the documents: recipe, inputs, versions

    @property
    def job(self) -> str:
        """The name of this very work."""
        return xxh3_128_hexdigest(json.dumps(self.facts, sort_keys=True).encode())

    def ending(self, work: Path) -> Ending:
        """Return what is needed to publish what the stages have left in a work folder."""
        return Ending(
            recipe=self.recipe, tasks=self.tasks, facts=self.facts, job=self.job, output=self.output, work=work
        )

    def stages(self, work: Path) -> list[Stage]:
        """Return what is to be run in a work folder, in order."""
        plan = StagePlan(recipe=self.recipe, tasks=self.tasks, evaluation=self.evaluation, work=work)
        return plan.build()


@dataclass(frozen=True, kw_only=True)
class Curated:
    """The numbers of curation.json; `reused` when an earlier run had made the output already."""

    output: Path
    numbers: dict[str, Any]
    reused: bool = False


def plan_curation(recipe: Recipe, inputs: Sequence[str | Path] = (), output: Path | None = None) -> Curation:
    """Find the files of a recipe and cut them in tasks; what is given here comes before what the recipe says.

    Raises:
        UsageError: neither says what to read, or where to write.
        InputError: an input is missing or unusable.
    """
    paths = list(inputs) or list(recipe.inputs.paths)
    place = output or (Path(recipe.output) if recipe.output else None)
    place = place and place.absolute()  # jobs of a cluster may begin in another folder
    if not paths or place is None:
        missing = " and ".join(["no inputs"] * (not paths) + ["no output"] * (place is None))
        raise UsageError(
            f"the recipe {recipe.name} names {missing}",
            "inputs.paths and output in the recipe, or --input and --output",
            "add them to either",
        )
    files = find_inputs(paths)
    evaluation = {
        number: find_inputs(step.texts) for number, step in enumerate(recipe.steps) if isinstance(step, Decontamination)
    }
    facts = {
        "version": VERSION,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "recipe": recipe.decisive(),
        "inputs": input_facts(files),
        "evaluation": {str(number): input_facts(pieces) for number, pieces in evaluation.items()},
    }
    tasks = cut(files, recipe.tasks)
    return Curation(recipe=recipe, output=place, tasks=tasks, evaluation=evaluation, facts=facts)


def cut(files: Sequence[Piece], wanted: int | None) -> list[Task]:
    """Cut files in about as many tasks as wanted; files that cannot be cut stay whole."""
    if wanted is None:
        return plan_tasks(files, TASK_BYTES)
    total = sum(file.disk_bytes for file in files)
    return [replace(task, number=number) for number, task in enumerate(plan_tasks(files, max(1, -(-total // wanted))))]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Jobs that will make the output; `are_new` unless an earlier call has submitted them."""

    jobs: Sequence[str]
    are_new: bool


def curate(
    recipe: Recipe,
    inputs: Sequence[str | Path] = (),
    output: Path | None = None,
    *,
    workers: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Curated:
    """Clean documents as a recipe says, on this machine; the output appears when it is complete.

    It depends on recipe and inputs alone; a run that was stopped is continued by the same call. Processes are spawned:
    a script that calls this guards its own start with `if __name__ == "__main__"`.

    Raises:
        UsageError: the output holds something else, or a step cannot be had.
        InputError: a bad record under the policy fail, or a damaged file.
        StorageError: another run is writing the output.
        WorkerError: a process died.
    """
    from data_tools.curation.local import run_stages

    curation = plan_curation(recipe, inputs, output)
    numbers = finished_result(curation.output, curation.job)
    if numbers is not None:
        return Curated(output=curation.output, numbers=numbers, reused=True)
    with own_work_folder(curation.output, curation.job) as work:
        run_stages(curation.stages(work), work / "logs", workers, on_progress)
        numbers = finish(curation.ending(work))
        shutil.rmtree(work)
    return Curated(output=curation.output, numbers=numbers)


def curate_on_ray(recipe: Recipe, inputs: Sequence[str | Path] = (), output: Path | None = None) -> Curated:
    """Clean documents as `curate` does, on a Ray cluster that shares the file system.

    Raises:
        UsageError: as `curate`, or Ray is not installed.
        WorkerError: tasks failed.
    """
    from data_tools.curation.cluster import ClusterJob, run_on_ray

    curation = plan_curation(recipe, inputs, output)
    numbers = finished_result(curation.output, curation.job)
    if numbers is not None:
        return Curated(output=curation.output, numbers=numbers, reused=True)
    with own_work_folder(curation.output, curation.job) as work:
        stages = curation.stages(work)
        run_on_ray(ClusterJob(name=recipe.name, stages=stages, work=work, most_at_once=recipe.workers))
        numbers = finish(curation.ending(work))
        shutil.rmtree(work)
    return Curated(output=curation.output, numbers=numbers)


def submit(recipe: Recipe, inputs: Sequence[str | Path] = (), output: Path | None = None) -> Curated | Submitted:
    """Submit to Slurm what is not finished of a curation; its last job publishes the output.

    The same call again tells whether it is under way, submits what has failed, or returns the result.

    Raises:
        UsageError: as `curate`, or there is no Slurm, or the recipe does not say how to use it.
        WorkerError: Slurm refuses a job.
    """
    from data_tools.curation.cluster import jobs_under_way, submit_to_slurm

    curation = plan_curation(recipe, inputs, output)
    numbers = finished_result(curation.output, curation.job)
    if numbers is not None:
        shutil.rmtree(work_folder(curation.output), ignore_errors=True)  # the logs
        return Curated(output=curation.output, numbers=numbers, reused=True)
    with own_work_folder(curation.output, curation.job) as work:
        if jobs := jobs_under_way(work):
            return Submitted(jobs=jobs, are_new=False)
        return Submitted(jobs=submit_to_slurm(_cluster_job(curation, work)), are_new=True)


def outline(recipe: Recipe, inputs: Sequence[str | Path] = (), output: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name of every stage of `curate`, and its number of tasks and blocks in words.

    Raises:
        UsageError: as `curate`.
    """
    curation = plan_curation(recipe, inputs, output)
    for stage in curation.stages(work_folder(curation.output)):
        blocks = [block.name for block in stage.pipeline if block.type != "account"]
        yield stage.name, f"    {stage.tasks} tasks: {', '.join(blocks)}"


def batch_scripts(
    recipe: Recipe, inputs: Sequence[str | Path] = (), output: Path | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the name and the batch script of every stage that `submit` would submit.

    Raises:
        UsageError: as `submit`.
    """
    from data_tools.curation.cluster import render_slurm

    curation = plan_curation(recipe, inputs, output)
    yield from render_slurm(_cluster_job(curation, work_folder(curation.output)))


def _cluster_job(curation: Curation, work: Path) -> ClusterJob:
    from data_tools.curation.cluster import ClusterJob, with_finish

    recipe, stages = curation.recipe, with_finish(curation.stages(work), curation.ending(work))
    return ClusterJob(name=recipe.name, stages=stages, work=work, slurm=recipe.slurm, most_at_once=recipe.workers)
