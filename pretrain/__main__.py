"""The command line of the training package: one function a command, each of them parse and call.

Importing this file imports no torch; what a command needs is imported inside its function.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pretrain.evaluation_commands import evaluate, quantize
from pretrain.inference.command_line import generate
from pretrain.planning.command_line import plan

# Newer typer carries a copy of click, older ones import it: this is the class of either.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="pretrain",
    help="Pretrain language models on DeepSpeed and Accelerate, with the same numbers on every layout.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help starts four times as fast
    pretty_exceptions_enable=False,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes to the run configuration, as YAML values."),
]
StoredType = Literal["auto", "bf16", "fp16", "fp32"]
Check = Literal["auto", "logits", "tensors"]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A run folder, a checkpoint folder, or a Hugging Face model folder.")
]

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint folder.")]

checkpoint_app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(plan)
app.command()(generate)
app.command()(evaluate)
app.command()(quantize)


@app.command()
def check(
    run: RunFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks of the whole job.")] = 1,
    ranks_of_node: Annotated[int, typer.Option("--ranks-per-node", min=1, help="GPUs of one node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a run will do and need, or what is wrong.

    Batch plan, layout, parameters, FLOPs and memory a rank; nothing is started.
    """
    from pretrain.check import print_check

    print_check(run, overrides or [], world_size=world_size, ranks_of_node=ranks_of_node, as_json=as_json)


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="Also check its data and disk.")] = None,
    overrides: Overrides = None,
    hostfile: Annotated[Path | None, typer.Option(help="Also check these hosts, and ssh to them.")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="A file for ssh -F.")] = None,
    hashes: Annotated[bool, typer.Option("--hashes", help="Read every byte of the data and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check whether this machine, or all nodes of a launcher, are fit for a run.

    Green, yellow or red, with what to do; the exit code is 1 where anything is red.
    """
    from pretrain.doctor.examination import examine

    code = examine(run, overrides or [], hostfile=hostfile, ssh_config=ssh_config, check_hashes=hashes, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def presets(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List the named models and the hardware they need."""
    from pretrain.preset_table import print_presets

    print_presets(markdown=markdown)


@app.command()
def metrics(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List every number that a run reports, with its unit and meaning."""
    from pretrain.reporting.metric_table import markdown_lines, plain_lines

    for line in markdown_lines() if markdown else plain_lines():
        print(line)


@app.command()
def samples(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run configuration, or a run folder.")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option("--step", min=1, help="The step, as in metrics.jsonl.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows of it to show.")] = 4,
    taken_back: Annotated[
        bool, typer.Option("--taken-back", help="Show the rows it went wrong with before the run rolled back.")
    ] = False,
) -> None:
    """Show the rows that a step trains on.

    Sources, document borders and text, fill-in-the-middle included, and what was read of each source before.
    """
    from pretrain.samples import sample_lines

    for line in sample_lines(run, overrides or [], step=step, count=rows, taken_back=taken_back):
        print(line)


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on from the newest checkpoint; required, never, or a checkpoint's folder or URL."),
    ] = "auto",
    time_limit: Annotated[
        str | None, typer.Option(help="Save and stop in time, such as 23h50m; a Slurm job's end is known without it.")
    ] = None,
) -> None:
    """Train.

    Under torchrun, deepspeed, accelerate launch or srun this is one rank of the job. Ctrl-C, SIGTERM, SIGUSR1 and a
    file named `stop` in the run folder save and stop; a second signal stops at once.
    """
    from pretrain.durations import require_duration

    limit_seconds = None if time_limit is None else require_duration("--time-limit", time_limit)
    from pretrain import run as composition

    raise typer.Exit(composition.train(run, overrides or [], resume, limit_seconds))


@app.command()
def goodput(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Show where the time of a run went, over all its starts, and how often to save."""
    from pretrain.training.goodput import goodput_lines

    for line in goodput_lines(run):
        print(line)


@app.command()
def monitor(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page instead.")] = None,
    follow: Annotated[
        bool | None, typer.Option(help="Look again and again until Ctrl-C; default: on a terminal, not with --html.")
    ] = None,
    every_seconds: Annotated[float, typer.Option(min=0.2, help="Between two looks.")] = 2.0,
    log_alerts: Annotated[bool, typer.Option(help="Log each alert on stderr.")] = False,
    webhook: Annotated[str | None, typer.Option(help="POST each alert as JSON to this address.")] = None,
    mlflow_tags: Annotated[bool, typer.Option("--mlflow-tags", help="Tag each run on its MLflow.")] = False,
) -> None:
    """Watch runs from their folders alone: curves, speed, time left, alerts.

    On a terminal, or as one page with --html; training is not disturbed.
    """
    from pretrain.monitoring import alert_targets
    from pretrain.monitoring.watch import watch

    targets: list[alert_targets.Target] = [alert_targets.to_log] if log_alerts else []
    if webhook:
        targets.append(alert_targets.to_webhook(webhook))
    is_once = not (sys.stdout.isatty() and html is None if follow is None else follow)
    watch(runs, every_seconds=every_seconds, is_once=is_once, page=html, targets=targets, is_tagging=mlflow_tags)


@app.command()
def profile(
    run: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to profile.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=2, help="Steps before them.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: RUN_FOLDER/profile.")] = None,
) -> None:
    """Run a few steps under torch's profiler and show where the time went.

    Under a launcher on every rank; with DeepSpeed's flops and collectives; a Chrome trace is written. Nothing is saved.
    """
    from pretrain.run_profile import profile_run

    profile_run(run, overrides or [], steps=steps, warmup=warmup, output=output, tell=print)


@app.command()
def track(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    replay: Annotated[bool, typer.Option("--replay", help="Send what is missing; again does no harm.")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(help="mlflow, tensorboard or wandb; may be given several times; default: the configured ones."),
    ] = None,
    mlflow_uri: Annotated[str | None, typer.Option(help="Another MLflow than the run's own.")] = None,
) -> None:
    """Compare what trackers hold with metrics.jsonl, and fill them from it.

    MLflow also while the run trains; TensorBoard and W&B files when it does not. Exit code 1: something is missing.
    """
    # MLflow's own patience is eight tries of two minutes each
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from pretrain.monitoring import track as tracking

    is_whole = tracking.track(runs, trackers=to or [], mlflow_uri=mlflow_uri, is_replay=replay, tell=print)
    raise typer.Exit(0 if is_whole else 1)


@app.command()
def infill(
    source: Source,
    text: Annotated[list[str], typer.Option("--text", "-t", help="With <extra_id_0>, <extra_id_1>, ... for gaps.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most, sentinels included.")] = 64,
) -> None:
    """Fill the gaps of texts with an encoder-decoder."""
    from pretrain.inference.infill import infill_from

    typer.echo("\n\n".join(infill_from(source, text, max_new_tokens=max_new_tokens)))


@app.command()
def export(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    dtype: Annotated[StoredType, typer.Option(help="auto: that of an imported model, else bf16.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one safetensors file: 5GB, 500MB.")] = "5GB",
    check: Annotated[Check, typer.Option(help="logits: of whole models; auto: where they fit the memory.")] = "auto",
    adapter: Annotated[bool, typer.Option("--adapter", help="A peft folder of a run with model.lora.")] = False,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also a version of this model in the run's MLflow registry.")
    ] = None,
) -> None:
    """Write a Hugging Face folder, and check that it is the checkpoint."""
    from pretrain.export import export_source, parse_size
    from pretrain.export_adapter import export_adapter

    if adapter:
        print(export_adapter(source, output))
        return
    report = export_source(source, output, dtype=dtype, shard_bytes=parse_size(max_shard_size), check=check)
    print(report)
    if register:
        from pretrain.monitoring.registration import register_export

        print(register_export(source, report.folder, report.step, register))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
) -> None:
    """Check a Hugging Face folder and make it a checkpoint of step 0, which model.weights and all commands read."""
    from pretrain.import_folder import import_folder

    print(import_folder(folder, output))


@app.command()
def serve(
    source: Source,
    host: Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: its folder's.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Holds the token; or set PRETRAIN_SERVE_TOKEN.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Answers computed together.")] = 32,
    waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are refused.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 2048,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request.")] = 1 << 20,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="For a whole answer.")] = 300.0,
    grace_seconds: Annotated[float, typer.Option(min=0.0, help="To finish answers once told to stop.")] = 30.0,
    cache_gib: Annotated[float, typer.Option(min=0.001, help="Memory for the running answers' keys, values.")] = 4.0,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API.

    For looking at it; use vLLM with an exported folder for production. SIGTERM and Ctrl-C finish what runs.
    """
    from pretrain.inference.serving.address import read_token
    from pretrain.inference.serving.command import serve_until_told
    from pretrain.inference.serving.limits import Limits

    token = read_token(os.environ.get("PRETRAIN_SERVE_TOKEN"), token_file)
    limits = Limits(
        running=running,
        waiting=waiting,
        new_tokens=max_new_tokens,
        body_bytes=max_body_bytes,
        request_seconds=request_seconds,
        grace_seconds=grace_seconds,
        cache_gib=cache_gib,
    )
    code = serve_until_told(source, host=host, port=port, name=name, token=token, limits=limits)
    raise typer.Exit(code)


@checkpoint_app.command("list")
def checkpoint_list(run: RunFolder) -> None:
    """Every checkpoint of a run, the last written at the end."""
    from pretrain.checkpoint.commands import list_lines

    for line in list_lines(run):
        print(line)


@checkpoint_app.command("verify")
def checkpoint_verify(run: RunFolder) -> None:
    """Read every byte of a checkpoint, or of all of a run, and compare size and hash."""
    from pretrain.checkpoint.commands import verify_lines

    for line in verify_lines(run):
        print(line)


@checkpoint_app.command("inspect")
def checkpoint_inspect(run: RunFolder) -> None:
    """Show what a checkpoint holds, as JSON."""
    from pretrain.checkpoint.commands import inspect_lines

    for line in inspect_lines(run):
        print(line)


@checkpoint_app.command("diff")
def checkpoint_diff(first: RunFolder, second: RunFolder) -> None:
    """Show what differs between two checkpoints: settings, progress, and each tensor's largest change."""
    from pretrain.checkpoint.commands import diff_lines

    for line in diff_lines(first, second):
        print(line)


def main() -> None:
    """Run the command line and end the process with the exit code of the outcome."""
    code = run_command_line(sys.argv[1:])
    gc.freeze()  # all that is left lives to the end: to look for garbage in it would take a rank two seconds of CPU
    sys.exit(code)


def run_command_line(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors of the user are printed once, on stderr."""
    from pretrain.errors import Preempted, PretrainError, tell

    for chatty in ("torchao", "torch.utils._pytree"):  # on kernels that are not for this machine, at every import
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        code = app(args=_without_launcher_argument(arguments), prog_name="pretrain", standalone_mode=False)
    except PretrainError as error:
        tell(error, rank=os.environ.get("RANK", "0"), local_rank=os.environ.get("LOCAL_RANK", "0"))
        return error.exit_code
    except Preempted as stop:
        print(f"stopped in order, state saved: {stop}", file=sys.stderr)
        return stop.exit_code
    except USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        return 64
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return code if isinstance(code, int) else 0


def _without_launcher_argument(arguments: list[str]) -> list[str]:
    """DeepSpeed's launcher puts --local_rank=N before all others; the environment says the same."""
    return arguments[1:] if arguments and re.fullmatch(r"--local_rank=\d+", arguments[0]) else arguments


if __name__ == "__main__":
    main()
