"""prepare by several machines: each encodes a share of the tasks, one puts the dataset together.

The dataset is byte for byte that of one machine: what a task's files hold does not depend on who wrote them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.choices import Backend
from data_tools.input_files import find_inputs
from data_tools.journal import Journal
from data_tools.prepare import PrepareOptions, Progress, encoding_options, preparation_job, prepare
from data_tools.publish import Made, is_finished
from data_tools.ranges import RANGE_BYTES, plan_tasks
from data_tools.shard_writer import token_dtype
from data_tools.task_shares import Share, own_share
from data_tools.tokenizer import load_tokenizer
from data_tools.worker_pool import EncodingPool

if TYPE_CHECKING:
    from data_tools.curation.cluster import ClusterJob
    from data_tools.curation.recipe import Slurm
    from data_tools.document_tokenizer import DocumentTokenizer
    from data_tools.pieces import Piece

_REQUEST = "request.json"  # in the work folder of a cluster's job


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A dataset to be made: what every machine must be told alike."""

    inputs: Sequence[str | Path]
    tokenizer: Path
    output: Path
    options: PrepareOptions
    backend: Backend = Backend.AUTO
    range_bytes: int = RANGE_BYTES

    def encode(self, share: Share, workers: int = 1, progress: Progress | None = None) -> int:
        """Encode the tasks of a share that no earlier call has finished, and return how many the share has.

        Raises:
            StorageError: another process encodes this share.
            Exception: as `prepare`.
        """
        loaded, files, request, job = self._request()
        tasks = share.of(plan_tasks(files, self.range_bytes))
        if is_finished(self.output, request):
            return len(tasks)
        with own_share(self.output, job, share) as folder, closing(Journal(folder, job)) as journal:
            for left_over in folder.glob("*.tmp"):
                left_over.unlink()
            finished = {entry["task"] for entry in journal.entries if "task" in entry}
            missing = [task for task in tasks if task.number not in finished]
            if progress is not None:
                total = sum(task.disk_bytes for task in tasks)
                progress.start(total, total - sum(task.disk_bytes for task in missing))
            dtype = token_dtype(loaded.vocabulary_size)
            encoding = encoding_options(loaded.file, dtype, self.options, self.backend, folder)
            pool = EncodingPool(
                options=replace(encoding, threads=max(1, workers // max(1, len(tasks)))), workers=workers
            )
            on_progress = (lambda *_: None) if progress is None else progress.advance
            with closing(pool.run(missing, on_progress)) as encoded:
                for task, result in encoded:
                    journal.append({"task": task.number, "result": asdict(result)})
        return len(tasks)

    def finish(self, workers: int = 1, progress: Progress | None = None) -> Made:
        """Put the dataset together from what shares have encoded; what they have not is encoded here.

        Raises:
            StorageError: a share is still being encoded.
            Exception: as `prepare`.
        """
        return prepare(
            list(self.inputs),
            self.tokenizer,
            self.output,
            self.options,
            workers=workers,
            backend=self.backend,
            range_bytes=self.range_bytes,
            progress=progress,
        )

    def is_made(self) -> bool:
        """Return whether the output is the whole dataset of this very request.

        Raises:
            UsageError: it holds something else.
            ShardError: it is this dataset, damaged.
        """
        return is_finished(self.output, self._request()[2])

    def name(self) -> str:
        """Return what tells this request from all others."""
        return self._request()[3]

    def _request(self) -> tuple[DocumentTokenizer, list[Piece], dict[str, Any], str]:
        loaded = load_tokenizer(self.tokenizer, self.options.eos_token)
        files = find_inputs(self.inputs)
        return loaded, files, *preparation_job(files, loaded.identity, self.options, self.backend, self.range_bytes)


def cluster_job(preparation: Preparation, shares: int, slurm: Slurm | None = None) -> ClusterJob:
    """Return the job by which datatrove's executors run the shares, then put the dataset together.

    Needs the extra `curate`. The rank of a task is the number of its share.
    """
    from data_tools.curation.cluster import ClusterJob
    from data_tools.curation.preparation_blocks import EncodeShare, FinishDataset
    from data_tools.curation.stages import Stage

    output = preparation.output.absolute()
    at_work = replace(preparation, output=output)
    stages = [
        Stage(name="encode", tasks=shares, pipeline=[EncodeShare(at_work)]),
        Stage(name="finish", tasks=1, pipeline=[FinishDataset(at_work)]),
    ]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", output.name)
    return ClusterJob(
        name=f"prepare-{name}", stages=stages, work=output.parent / f".{output.name}.cluster", slurm=slurm
    )


def forget_other_work(preparation: Preparation, job: ClusterJob) -> None:
    """Make a cluster run all that this request needs.

    What datatrove has noted as done for another request or another number of shares, or for an output that has been
    removed since, would be left out.
    """
    from data_tools.curation.accounting import write_whole

    place = job.work / _REQUEST
    request = json.dumps({"request": preparation.name(), "shares": job.stages[0].tasks}).encode()
    is_this = place.is_file() and place.read_bytes() == request
    if not is_this or any((job.work / "logs" / job.stages[-1].name / "completions").glob("*")):
        shutil.rmtree(job.work, ignore_errors=True)
    write_whole(place, request)
