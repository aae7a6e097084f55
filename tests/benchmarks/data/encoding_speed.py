"""Speed and memory of `prepare` beside the bare libraries and the peers, in interleaved rounds.

Which programs there are is peers.py's; what they take is measured by measure.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.data.measure import CommandFailedError, Cost, Table, middle, run_measured
from tests.benchmarks.data.peers import Program, programs


def measure_encoding(
    table: Table, corpus: Path, tokenizer: Path, scratch: Path, *, rounds: int, workers: int, megatron: Path | None
) -> None:
    """Measure the programs that encode with the tokenizers library, and compare ours with each."""
    chosen = [program for program in programs(tokenizer, workers, megatron) if "gigatoken" not in program.name]
    costs, starts = _run_all(table, chosen, corpus, scratch, rounds)
    tokens = _tokens(corpus, tokenizer, scratch)
    speeds = {}
    for name in costs:
        cpu = middle([cost.cpu_seconds for cost in costs[name]]) - middle([cost.cpu_seconds for cost in starts[name]])
        speeds[name] = tokens / cpu / 1e6
        table.add(name, f"{speeds[name]:.2f} M tokens/CPU-s after the start, {_wall_and_memory(costs[name], tokens)}")
    ours = speeds.get("prepare, tokenizers")
    if ours is None:
        return
    table.add("prepare, tokenizers", f"{ours:.2f} M tokens/CPU-s", "1.15", met=ours >= 1.15)
    bare = speeds["bare tokenizers"]
    table.add("... of bare encode_batch_fast", f"{ours / bare:.2f}", "1.15 / 1.27 = 0.91", met=ours / bare >= 0.91)
    for name, speed in speeds.items():
        if name.startswith(("datatrove", "Megatron")):
            table.add(f"... against {name}", f"{ours / speed:.2f}", "1.4", met=ours / speed >= 1.4)


def measure_fast_encoding(
    table: Table, corpus: Path, tokenizer: Path, scratch: Path, *, rounds: int, workers: int
) -> None:
    """Measure gigatoken from end to end, the start included, beside the bare loop by which its speed was set."""
    chosen = [program for program in programs(tokenizer, workers, None) if "gigatoken" in program.name]
    costs, _ = _run_all(table, chosen, corpus, scratch, rounds)
    tokens = _tokens(corpus, tokenizer, scratch)
    for name, measured in costs.items():
        cpu = middle([cost.cpu_seconds for cost in measured])
        table.add(name, f"{cpu / tokens * 1e6:.4f} CPU-s/M tokens, {_wall_and_memory(measured, tokens)}")
    if len(costs) == len(chosen) == 2:
        ours, bare = ([cost.wall_seconds for cost in costs[program.name]] for program in chosen)
        speed = tokens / min(ours) / 1e6
        table.add("prepare, gigatoken, end to end", f"{speed:.1f} M tokens/s wall at best", "30", met=speed >= 30)
        share = middle([alone / prepared for alone, prepared in zip(bare, ours, strict=True)])
        table.add("... of the bare loop in the same round", f"{share:.2f}", "30 / 37 = 0.81", met=share >= 0.81)


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


def _run_all(
    table: Table, chosen: Sequence[Program], corpus: Path, scratch: Path, rounds: int
) -> tuple[dict[str, list[Cost]], dict[str, list[Cost]]]:
    """Run every program on the corpus and on one document (its start), in turn; those that cannot run are told."""
    one = scratch / "one-document" / "one.jsonl"
    one.parent.mkdir(parents=True, exist_ok=True)
    with corpus.open("rb") as file:
        one.write_bytes(file.readline())
    alone = scratch / "corpus" / "corpus.jsonl"  # datatrove reads folders
    alone.parent.mkdir(exist_ok=True)
    alone.unlink(missing_ok=True)
    alone.symlink_to(corpus.resolve())
    costs: dict[str, list[Cost]] = {}
    starts: dict[str, list[Cost]] = {}
    for program in chosen:
        if program.missing:
            table.add(program.name, f"not run: {program.missing}")
        else:
            costs[program.name], starts[program.name] = [], []
    for _ in range(rounds):
        for program in chosen:
            if program.name not in costs:
                continue
            try:
                starts[program.name].append(_run(program, one, scratch))
                costs[program.name].append(_run(program, alone, scratch))
            except CommandFailedError as error:
                del costs[program.name], starts[program.name]
                table.add(program.name, f"failed: {str(error)[:200]}")
    return costs, starts


def _wall_and_memory(costs: Sequence[Cost], tokens: int) -> str:
    wall = min(cost.wall_seconds for cost in costs)
    peak = max(cost.proportional_bytes for cost in costs)
    return f"{tokens / wall / 1e6:.2f} M/s wall at best, PSS {peak / 1e6:.0f} MB"


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
