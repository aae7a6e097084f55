"""All checks of `pretrain doctor`, in the order in which they help, and the report of all nodes.

Every rank of a launcher calls; the first rank of a node looks at the node, the first of all prints.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

from pretrain import distributed
from pretrain.config import RunConfig
from pretrain.distributed import Place
from pretrain.doctor import accelerators, access, machine, network
from pretrain.doctor.finding import Check, Finding, Level, merged, run_checks
from pretrain.run_plan import RunPlan, load_and_plan

CHECKPOINT_BYTES_A_PARAMETER = 12  # fp32 weight and two moments
COLORS: Mapping[Level, str] = {"green": "green", "yellow": "yellow", "red": "bold red", "skipped": "dim"}


def examine(
    run: Path | None,
    overrides: Sequence[str],
    *,
    hostfile: Path | None,
    ssh_config: Path | None,
    check_hashes: bool,
    as_json: bool,
) -> int:
    """Run all checks and print what they found; returns 1 where anything is red, else 0, on every rank.

    Raises:
        ConfigError: the run configuration is wrong.
    """
    place = distributed.read_place()
    planned = load_and_plan(run, overrides, place.world_size) if run is not None else None
    distributed.start(place, timeout_seconds=120)
    try:
        with ThreadPoolExecutor(1) as beside:  # hosts that do not answer are waited for while the rest is looked at
            asked = beside.submit(list, run_checks(_host_checks(place, hostfile, ssh_config)))
            findings = [*run_checks(_node_checks(planned, check_hashes))] if place.local_rank == 0 else []
            if place.is_main_process:
                findings += _left_out(has_run=run is not None, has_hostfile=hostfile is not None)
            # outside of run_checks: a collective that one rank leaves early would make the others wait
            findings += network.check_devices_against_each_other(place)
            findings += network.check_pairs(place)
            findings += network.check_clocks(place)
            findings += asked.result()
        gathered = distributed.gather_json([socket.gethostname(), [finding.to_json() for finding in findings]])
    finally:
        distributed.stop()
    by_node: dict[str, list[Finding]] = {}
    for node, values in gathered:
        by_node.setdefault(node, []).extend(Finding.from_json(value) for value in values)
    report = merged(by_node)
    if place.is_main_process:
        _print_json(report, place) if as_json else _print_report(report, len(by_node), place)
    return 1 if any(finding.level == "red" for finding in report) else 0


def _host_checks(place: Place, hostfile: Path | None, ssh_config: Path | None) -> Mapping[str, Check]:
    if hostfile is None or not place.is_main_process:
        return {}
    return {"hostfile": partial(access.check_hostfile, hostfile, ssh_config)}


def _node_checks(planned: tuple[RunConfig, RunPlan] | None, check_hashes: bool) -> Mapping[str, Check]:
    environment = distributed.environment()
    folder = planned[0].folder if planned else Path.cwd()
    checks: dict[str, Check] = {
        "versions": machine.check_versions,
        "limits": machine.check_limits,
        "secrets": partial(machine.check_secrets, environment, Path.cwd()),
        "compiler cache": partial(machine.check_compiler_cache, environment),
        "GPUs": accelerators.check_devices,
        "attention": accelerators.check_attention,
        "fused AdamW": accelerators.check_fused_optimizer,
    }
    if planned is None:
        return checks | {"disk": partial(machine.check_disk, folder, None, 0)}
    config, plan = planned
    kept = (config.checkpoint.keep_last or 1) + 1  # the next one is written before the oldest goes
    needed = CHECKPOINT_BYTES_A_PARAMETER * plan.parameters.total * kept
    vocabulary = plan.architecture.vocabulary_size
    checks["disk"] = partial(machine.check_disk, folder, needed, kept)
    checks["data"] = partial(access.check_data, config, vocabulary, check_hashes=check_hashes)
    return checks


def _left_out(*, has_run: bool, has_hostfile: bool) -> Iterator[Finding]:
    """What was not asked for: people must not take silence for health."""
    if not has_run:
        text = "no run was named: `pretrain doctor RUN.yaml` reads its data, and knows what checkpoints need"
        yield Finding(name="data", level="skipped", text=text)
    if not has_hostfile:
        yield Finding(name="hostfile", level="skipped", text="none was named: --hostfile FILE asks each host over ssh")


def _print_report(report: Sequence[Finding], nodes: int, place: Place) -> None:
    console = Console()
    for finding in report:
        where = f" [{', '.join(finding.nodes)}]" if nodes > 1 else ""
        console.print(f"{finding.level:>7}", style=COLORS[finding.level], end="  ")
        console.print(f"{finding.name}: {finding.text}{where}", markup=False, highlight=False, soft_wrap=True)
        if finding.fix:
            console.print(f"{'':>7}  fix: {finding.fix}", markup=False, highlight=False, soft_wrap=True)
    counts = {
        level: sum(finding.level == level for finding in report) for level in ("red", "yellow", "green", "skipped")
    }
    said = ", ".join(f"{count} {level}" for level, count in counts.items() if count)
    console.print(f"{place.world_size} ranks on {nodes} nodes: {said}", highlight=False)


def _print_json(report: Sequence[Finding], place: Place) -> None:
    worst = next((level for level in ("red", "yellow") if any(finding.level == level for finding in report)), "green")
    values = {"level": worst, "ranks": place.world_size, "findings": [finding.to_json() for finding in report]}
    Console().print_json(data=values, indent=2)
