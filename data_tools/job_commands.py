"""The commands whose work may run on clusters: curate and prepare-shared; __main__.py registers them.

Parses and calls; what it calls is imported inside the commands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.choices import LONGEST_DOCUMENT_BYTES, Backend, BadLinePolicy, Executor
from data_tools.command_options import (
    FRACTIONS,
    BadLine,
    EosToken,
    Fractions,
    IdKey,
    Library,
    MaxDocumentBytes,
    Metadata,
    Output,
    Processes,
    SharedInputs,
    ShuffleSeed,
    SplitSeed,
    TextKey,
    TokenizerFile,
)
from data_tools.errors import UsageError

Where = Annotated[Executor, typer.Option(help="Where the work is done.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the stages, or Slurm's batch scripts.")]
UseThreads = Callable[[int | None], None]


def register(app: typer.Typer, use_threads: UseThreads) -> None:
    """Add the commands to a command line; `use_threads` sets how many threads libraries start."""
    app.command()(curate)

    @app.command()
    def prepare_shared(
        inputs: SharedInputs,
        tokenizer: TokenizerFile,
        output: Output,
        shares: Annotated[int, typer.Option(min=1, help="In how many shares the tasks are cut.")],
        share: Annotated[int | None, typer.Option(help="Encode this one here, from 0, and end.")] = None,
        executor: Where = Executor.LOCAL,
        cluster: Annotated[Path | None, typer.Option(help="YAML with a section slurm, as in recipes.")] = None,
        dry_run: DryRun = False,
        text_key: TextKey = "text",
        id_key: IdKey = "id",
        split: Fractions = FRACTIONS,
        seed: SplitSeed = 0,
        workers: Processes = None,
        backend: Library = Backend.AUTO,
        on_bad_line: BadLine = BadLinePolicy.FAIL,
        eos_token: EosToken = None,
        metadata: Metadata = "",
        max_document_bytes: MaxDocumentBytes = LONGEST_DOCUMENT_BYTES,
        shuffle_seed: ShuffleSeed = None,
    ) -> None:
        """Do what prepare does on several machines, to the same bytes: shares of the tasks, then the dataset."""
        use_threads(workers)
        from data_tools.prepare import PrepareOptions, parse_fractions
        from data_tools.prepare_shared import Preparation

        options = PrepareOptions(
            text_key=text_key,
            id_key=id_key,
            fractions=parse_fractions(split),
            seed=seed,
            on_bad_line=on_bad_line,
            eos_token=eos_token,
            metadata_keys=tuple(key for key in metadata.split(",") if key),
            max_document_bytes=max_document_bytes,
            shuffle_seed=shuffle_seed,
        )
        asked = Preparation(inputs=inputs, tokenizer=tokenizer, output=output, options=options, backend=backend)
        processes = workers or len(os.sched_getaffinity(0))
        if share is not None:
            _encode_share(asked, share, shares, processes)
        elif executor is Executor.LOCAL:
            _prepare_here(asked, shares, processes)
        else:
            _prepare_on_cluster(asked, shares, executor, cluster, dry_run)


def curate(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: inputs, steps, output.")],
    inputs: Annotated[list[str] | None, typer.Option("--input", help="Instead of the recipe's inputs.paths.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to make, instead of the recipe's output.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's; default: one a core.")] = None,
    executor: Where = Executor.LOCAL,
    dry_run: DryRun = False,
) -> None:
    """Clean documents as a recipe says, and report what every step did; run again, it goes on where it stopped."""
    from data_tools.curation.packages import need_packages

    need_packages()
    from data_tools import curate as curation
    from data_tools.curation.recipe_text import read_recipe
    from data_tools.curation.screen import StageProgress, show_steps

    chosen = read_recipe(recipe)
    chosen = chosen.model_copy(update={"workers": workers or chosen.workers})
    asked = (chosen, inputs or (), output)
    if dry_run:
        _show_stages(curation.batch_scripts(*asked) if executor is Executor.SLURM else curation.outline(*asked))
        return
    done: curation.Curated | curation.Submitted
    if executor is Executor.SLURM:
        done = curation.submit(*asked)
    elif executor is Executor.RAY:
        done = curation.curate_on_ray(*asked)
    else:
        with StageProgress() as progress:
            count = chosen.workers or len(os.sched_getaffinity(0))
            done = curation.curate(*asked, workers=count, on_progress=progress)
    if isinstance(done, curation.Submitted):
        _say_jobs(done.jobs, are_new=done.are_new)
        return
    if done.reused:
        typer.echo(f"{done.output} is complete and was made from this very request: nothing to do")
    show_steps(done.numbers)
    typer.echo(
        f"{done.output}: {len(done.numbers['files']):,} files for data-tools prepare, report.html, curation.json"
    )


def _encode_share(asked: Any, share: int, shares: int, processes: int) -> None:
    from data_tools.progress import EncodingProgress
    from data_tools.task_shares import Share

    with EncodingProgress() as progress:
        tasks = asked.encode(Share(number=share, count=shares), processes, progress)
    typer.echo(f"share {share} of {shares}: {tasks:,} tasks are encoded")


def _prepare_here(asked: Any, shares: int, processes: int) -> None:
    """Encode all shares one after another, and put the dataset together: what a cluster does, on this machine."""
    from data_tools.preparation_report import show_report

    for number in range(shares):
        _encode_share(asked, number, shares, processes)
    began = time.monotonic()
    made = asked.finish(processes)
    typer.echo(f"{asked.output}: {', '.join(made.manifests)}{' (nothing to do)' if made.reused else ''}")
    if not made.reused:
        show_report(asked.output, time.monotonic() - began)


def _prepare_on_cluster(asked: Any, shares: int, executor: Executor, cluster: Path | None, dry_run: bool) -> None:
    from data_tools.curation.packages import need_packages

    need_packages()
    from data_tools.curation.cluster import jobs_under_way, render_slurm, run_on_ray, submit_to_slurm
    from data_tools.curation.recipe_text import read_slurm
    from data_tools.prepare_shared import cluster_job, forget_other_work

    if executor is Executor.SLURM and cluster is None:
        raise UsageError("no --cluster", "a YAML file with a section slurm", "write slurm: {partition: NAME} into one")
    job = cluster_job(asked, shares, None if cluster is None else read_slurm(cluster))
    if dry_run:
        _show_stages(
            render_slurm(job) if executor is Executor.SLURM else ((s.name, f"    {s.tasks} tasks") for s in job.stages)
        )
    elif under_way := jobs_under_way(job.work):
        _say_jobs(under_way, are_new=False)
    elif asked.is_made():
        typer.echo(f"{asked.output} is complete and was made from this very request: nothing to do")
    elif executor is Executor.RAY:
        forget_other_work(asked, job)
        run_on_ray(job)
        typer.echo(f"{asked.output} is complete")
    else:
        forget_other_work(asked, job)
        _say_jobs(submit_to_slurm(job), are_new=True)


def _show_stages(stages: Iterable[tuple[str, str]]) -> None:
    for name, text in stages:
        typer.echo(f"==> {name}\n{text}")


def _say_jobs(jobs: Iterable[str], *, are_new: bool) -> None:
    typer.echo(f"{'submitted' if are_new else 'under way'}: jobs {', '.join(jobs)}; the last one publishes")
