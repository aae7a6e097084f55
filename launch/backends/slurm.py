"""`--on slurm`: a batch script that starts one agent a node with srun; needs no ssh.

Before the time limit, and when the job is preempted, ranks save and the job goes back into the queue.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from launch.backends.place import Place, guardian_words, train_words
from launch.job import Job
from launch.rendering import Command, RenderedFile, Rendering
from launch.travelling import problems_of_sending
from pretrain.doctor.hosts import host_name_problem
from pretrain.errors import ConfigError, ExitCode


def render_slurm(job: Job, place: Place) -> Rendering:
    """Render the batch script, and the command that hands it in.

    Raises:
        ConfigError: where a value would stand in the script as a secret.
    """
    problems = list(problems_of_sending(place.travelling, "the batch script"))
    problems += [found for host in job.slurm.exclude if (found := host_name_problem(host, "slurm.exclude"))]
    if problems:
        raise ConfigError(*problems)
    script = RenderedFile(path=place.status(job) / "job.sbatch", text="\n".join(_script(job, place)) + "\n", mode=0o700)
    return Rendering(
        files=(script,),
        commands=(Command(words=("sbatch", str(script.path))),),
        environment=dict(place.environment),
        status=place.status(job),
        notes=("the job runs when Slurm starts it: squeue --me",),
    )


def _script(job: Job, place: Place) -> Iterator[str]:
    yield "#!/bin/bash"
    yield from (f"#SBATCH --{name}" for name in _options(job, place))
    yield f"# Made by: python -m launch {job.name} --on slurm. One agent a node; ranks are below it."
    yield "set -u"
    yield f"cd {shlex.quote(str(place.folder(job)))} || exit 74"
    yield f"export PATH={shlex.quote(place.environment.get('PATH', '/usr/bin:/bin'))}"
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "HOME", "SLURM_CONF"):
        if name in place.environment:
            yield f"export {name}={shlex.quote(place.environment[name])}"
    yield from (f"export {name}={shlex.quote(value)}" for name, value in place.travelling.items())
    status = shlex.quote(f"{place.status(job)}/slurm-") + "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    yield f"status={status}"
    yield 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    # where Slurm itself reaches the node: its name need not be one that the network knows
    yield "address=$(scontrol --oneliner show node \"$first\" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')"
    yield f"port={job.port}" if job.port else "port=$((20000 + SLURM_JOB_ID % 12000))"
    yield ""
    yield "# USR1 comes before the time limit, TERM with a preemption; ranks get it, save, and end with 75."
    # the agents' signal is TERM: a launcher that does not know USR1 would die of it
    yield "trap 'scancel --signal=TERM \"$SLURM_JOB_ID.0\" 2>/dev/null' USR1 TERM"
    yield _srun(job, place)
    yield "agents=$!"
    yield 'while kill -0 "$agents" 2>/dev/null; do wait "$agents"; done  # a signal ends wait, not the agents'
    yield 'wait "$agents"'
    yield "code=$?"
    yield f'{shlex.quote(place.python(job))} -m launch.outcome "$status" --launcher-code "$code"'
    yield "code=$?"
    yield f"again={job.slurm.most_requeues}"
    yield f'if [ "$code" -eq {ExitCode.PREEMPTED:d} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$again" ]; then'
    yield '    echo "saved and stopped: back into the queue"'
    yield '    scontrol requeue "$SLURM_JOB_ID"'
    yield "    sleep 60 # Slurm ends this script"
    yield "fi"
    yield 'exit "$code"'


def _options(job: Job, place: Place) -> Iterator[str]:
    slurm = job.slurm
    yield from (f"job-name={job.name}", f"nodes={job.nodes}", "ntasks-per-node=1")
    if job.accelerator == "gpu":
        yield f"gpus-per-node={job.gpus_per_node}"
    if slurm.cpus_per_task:
        yield f"cpus-per-task={slurm.cpus_per_task}"
    if job.time_limit_seconds:
        hours, seconds = divmod(job.time_limit_seconds, 3600)
        yield f"time={hours}:{seconds // 60:02d}:{seconds % 60:02d}"
    yield f"signal=B:USR1@{slurm.signal_seconds}"
    yield from ("requeue", "open-mode=append", "export=NIL")
    output = shlex.quote(f"{place.status(job)}/slurm-%j.out")
    yield f"output={output}"
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        if value := getattr(slurm, name):
            yield f"{name}={value}"
    if slurm.exclude:
        yield f"exclude={','.join(slurm.exclude)}"
    if slurm.exclusive:
        yield "exclusive"


def _srun(job: Job, place: Place) -> str:
    cpus = f" --cpus-per-task={job.slurm.cpus_per_task}" if job.slurm.cpus_per_task else ""
    return (
        f"srun --export=ALL --kill-on-bad-exit=1 --wait=60{cpus} {shlex.quote(place.python(job))} -m launch.node "
        f"--nodes {job.nodes} --node-rank-from SLURM_NODEID --ranks {job.gpus_per_node} "
        f'--address "${{address:-$first}}" --port "$port" --status "$status" {shlex.join(guardian_words(job))} '
        f"-- {shlex.join(train_words(job))} &"
    )
