"""Hands stages to a cluster: datatrove's executors for Slurm and Ray, chained so that each waits for the one before.

Schedules nothing itself; the last stage publishes the output.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data_tools.curation.accounting import write_whole
from data_tools.curation.finish import Ending, finish
from data_tools.curation.recipe import Slurm
from data_tools.curation.stages import Stage
from data_tools.errors import UsageError, WorkerError

SUBMITTED = "submitted.json"
FINISH = "finish"


class FinishStep(PipelineStep):
    """Publishes the output, as the last stage of a job on a cluster; nothing of the work but its logs is left."""

    type = "finish"
    name = "publish"

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Add up, write the report and publish."""
        finish(self.ending)
        for left_over in self.ending.work.iterdir():
            if left_over.is_dir() and left_over.name != "logs":
                shutil.rmtree(left_over)


def with_finish(stages: Sequence[Stage], ending: Ending) -> list[Stage]:
    """Return the stages and the one that publishes what they made."""
    return [*stages, Stage(name=FINISH, tasks=1, pipeline=[FinishStep(ending)])]


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """Stages and where their logs and completions are kept."""

    name: str
    stages: Sequence[Stage]
    work: Path
    slurm: Slurm | None = None
    most_at_once: int | None = None  # tasks

    @property
    def settings(self) -> Slurm:
        """What Slurm wants to know.

        Raises:
            UsageError: nobody has said.
        """
        if self.slurm is None:
            raise UsageError(
                f"the job {self.name} has no section slurm",
                f"slurm: {{partition: NAME}}, and {', '.join(list(Slurm.model_fields)[1:])}",
                "add the section to the YAML file, or use --executor local",
            )
        return self.slurm


def submit_to_slurm(job: ClusterJob) -> list[str]:
    """Submit what is not finished yet, each stage after the one before, and return the numbers of the jobs.

    Raises:
        UsageError: there is no Slurm, or nobody said how to use it.
        WorkerError: Slurm refuses a job.
    """
    if job.settings and shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on the PATH", "a machine that submits jobs to Slurm", "use --executor local")
    before: SlurmPipelineExecutor | None = None
    submitted: list[str] = []
    for stage in job.stages:
        executor = _slurm_executor(stage, job, job.work / "logs" / stage.name / "slurm")
        executor.depends = before
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise WorkerError(
                f"sbatch refused stage {stage.name} (exit code {error.returncode})",
                "settings that this cluster accepts",
                f"see what sbatch said above, and the section slurm; submitted so far: {submitted}",
            ) from error
        if executor.job_id != -1:
            submitted.append(str(executor.job_id))
            write_whole(job.work / SUBMITTED, json.dumps(submitted).encode())
        before = executor
    return submitted


def jobs_under_way(work: Path) -> list[str]:
    """Return the jobs that an earlier call has submitted and Slurm still knows as waiting or running."""
    path = work / SUBMITTED
    if not path.exists() or shutil.which("squeue") is None:
        return []
    jobs = ",".join(json.loads(path.read_bytes()))
    command = ["squeue", "--noheader", "--jobs", jobs, "--format", "%A"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)  # it fails when it has forgotten them
    return sorted(set(listed.stdout.split()))


def render_slurm(job: ClusterJob) -> Iterator[tuple[str, str]]:
    """Yield the name and the batch script of every stage, as they would be submitted; nothing is written.

    Raises:
        UsageError: nobody said how to use Slurm.
    """
    for stage in job.stages:
        logs = job.work / "logs" / stage.name
        with tempfile.TemporaryDirectory() as scratch:
            executor = _slurm_executor(stage, job, Path(scratch))
            jobs = min(math.ceil(stage.tasks / executor.tasks_per_job), executor.max_array_size)
            script = executor.get_launch_file_contents(
                executor.get_sbatch_args(jobs), f"srun  -l -n 1 launch_pickled_pipeline {logs / 'executor.pik'}"
            )
        yield stage.name, script.replace(scratch, str(logs / "slurm"))


def _slurm_executor(stage: Stage, job: ClusterJob, slurm_logs: Path) -> SlurmPipelineExecutor:
    settings = job.settings
    return SlurmPipelineExecutor(
        stage.pipeline,
        tasks=stage.tasks,
        time=settings.time,
        partition=settings.partition,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=settings.memory_gigabytes,
        workers=job.most_at_once or -1,
        job_name=f"{job.name}-{stage.name}",
        qos=settings.qos,
        env_command=settings.setup or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        sbatch_args=dict(settings.sbatch),
        max_array_size=settings.most_jobs,
        logging_dir=str((job.work / "logs" / stage.name).absolute()),
        slurm_logs_folder=str(slurm_logs.absolute()),
        tasks_per_job=settings.tasks_per_job,
    )


def run_on_ray(job: ClusterJob) -> None:
    """Run what is not finished yet on the Ray cluster of this environment, or one of this machine, and wait for it.

    Raises:
        UsageError: Ray is not installed.
        WorkerError: tasks failed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "Ray is not installed", "a Python environment with Ray", "pip install ray, or --executor local"
        )
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    for stage in job.stages:
        logs = job.work / "logs" / stage.name
        executor = RayPipelineExecutor(
            stage.pipeline,
            tasks=stage.tasks,
            workers=job.most_at_once or -1,
            logging_dir=str(logs.absolute()),
            mem_per_cpu_gb=1,
        )
        executor.run()
        if failed := executor.get_incomplete_ranks():
            raise WorkerError(
                f"tasks {failed} of stage {stage.name} failed on Ray",
                "tasks that end well",
                f"see {logs / 'logs'}; the same command again goes on with what is not finished",
            )
