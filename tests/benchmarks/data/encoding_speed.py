"""Speed and memory of `prepare` beside the bare libraries and the peers, in interleaved rounds.

Which programs there are is peers.py's; what they take is measured by measure.py.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.data.measure import CommandFailedError, Cost, Table, middle, run_measured
from tests.benchmarks.data.peers import Program, programs


def measure_encoding(
    table: Table, corpus: Path, tokenizer: Path, scratch: Path, *, rounds: int, workers: int, megatron: Path | None
) -> None:
    """Run every program on one document (its start) and on the corpus, in turn, and print what each took."""
    one = scratch / "one-document" / "one.jsonl"
    one.parent.mkdir(parents=True, exist_ok=True)
    with corpus.open("rb") as file:
        one.write_bytes(file.readline())
    alone = scratch / "corpus" / "corpus.jsonl"  # datatrove reads folders
    alone.parent.mkdir(exist_ok=True)
    if not alone.exists():
        alone.symlink_to(corpus.resolve())
    costs: dict[str, list[Cost]] = defaultdict(list)
    starts: dict[str, list[Cost]] = defaultdict(list)
    able = []
    for program in programs(tokenizer, workers, megatron):
        if program.missing:
            table.add(program.name, f"not run: {program.missing}")
        else:
            able.append(program)
    for _ in range(rounds):
        for program in list(able):
            try:
                starts[program.name].append(_run(program, one, scratch))
                costs[program.name].append(_run(program, alone, scratch))
            except CommandFailedError as error:
                able.remove(program)
                table.add(program.name, f"failed: {str(error)[:200]}")
    tokens = _tokens(alone, tokenizer, scratch)
    speeds = {}
    for program in able:
        name = program.name
        cpu = middle([cost.cpu_seconds for cost in costs[name]]) - middle([cost.cpu_seconds for cost in starts[name]])
        wall = min(cost.wall_seconds for cost in costs[name])
        peak = max(cost.proportional_bytes for cost in costs[name])
        speeds[name] = tokens / cpu / 1e6
        rate = f"{speeds[name]:.2f} M tokens/CPU-s after the start, {tokens / wall / 1e6:.2f} M/s wall at best"
        table.add(name, f"{rate}, PSS {peak / 1e6:.0f} MB")
    _compare(table, speeds, costs, tokens)


def measure_memory(table: Table, small: Path, large: Path, tokenizer: Path, scratch: Path, *, workers: int) -> None:
    """Compare the memory of two sizes of input."""
    for program in programs(tokenizer, workers, None):
        if not program.name.startswith("prepare") or program.missing:
            continue
        peaks = [_run(program, corpus, scratch).proportional_bytes for corpus in (small, large)]
        growth = peaks[1] / peaks[0]
        sizes = [corpus.stat().st_size / 1e6 for corpus in (small, large)]
        measured = f"{peaks[0] / 1e6:.0f} MB at {sizes[0]:.0f} MB, {peaks[1] / 1e6:.0f} MB at {sizes[1]:.0f} MB"
        table.add(f"PSS of {program.name}", measured, "< 600 MB, +10% at most", met=peaks[1] < 6e8 and growth < 1.1)


def _compare(table: Table, speeds: dict[str, float], costs: dict[str, list[Cost]], tokens: int) -> None:
    ours = speeds.get("prepare, tokenizers")
    if ours is None:
        return
    bare = speeds["bare tokenizers, one process"]
    table.add(
        "prepare, tokenizers: of bare encode_batch_fast",
        f"{ours / bare:.2f}",
        "1.15 / 1.27 = 0.91",
        met=ours / bare >= 0.91,
    )
    table.add("prepare, tokenizers", f"{ours:.2f} M tokens/CPU-s", "1.15", met=ours >= 1.15)
    for name, speed in speeds.items():
        if name.startswith(("datatrove", "Megatron")):
            table.add(
                f"prepare, tokenizers against {name}",
                f"{ours / speed:.2f}",
                "1.4",
                met=ours / speed >= 1.4,
            )
    if "prepare, gigatoken" in speeds:
        wall = min(cost.wall_seconds for cost in costs["prepare, gigatoken"])
        table.add(
            "prepare, gigatoken, end to end",
            f"{tokens / wall / 1e6:.1f} M tokens/s wall",
            "30",
            met=tokens / wall >= 30e6,
        )
        bare_fast = speeds["bare gigatoken, one process"]
        table.add(
            "prepare, gigatoken: of bare gigatoken, reading and writing, by processor",
            f"{speeds['prepare, gigatoken'] / bare_fast:.2f}",
        )
        all_in = middle([cost.cpu_seconds for cost in costs["prepare, gigatoken"]])
        table.add(
            "prepare, gigatoken, all in",
            f"{all_in / tokens * 1e6:.4f} CPU-s/M tokens",
            "0.067 (2 cores)",
            met=all_in / tokens * 1e6 <= 0.067,
        )


def _run(program: Program, corpus: Path, scratch: Path) -> Cost:
    output = scratch / "output"
    _clear(scratch)
    cost = run_measured(program.words(corpus, output), program.environment)
    _clear(scratch)
    return cost


def _tokens(corpus: Path, tokenizer: Path, scratch: Path) -> int:
    from data_tools.prepare import PrepareOptions, prepare

    _clear(scratch)
    made = prepare([corpus], tokenizer, scratch / "output", PrepareOptions(), workers=2)
    _clear(scratch)
    return sum(manifest.tokens for manifest in made.manifests.values())


def _clear(scratch: Path) -> None:
    for path in [*scratch.glob("output*"), *scratch.glob(".output*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def corpora_of(sizes: Sequence[float], corpus: Path, folder: Path) -> list[Path]:
    """Return corpora of these sizes (MB)."""
    from tests.benchmarks.data.corpus import head_of

    return [head_of(corpus, size, folder) for size in sizes]
