"""How long `pretrain monitor` takes to open a run of a million lines, and what following it costs.

    python -m tests.benchmarks.monitor [--lines 1000000]

Opening is a process of its own, imports included, beside a bare read and count of the lines; following is processor
seconds a second of a run that writes three lines a second, looked at every two seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from pretrain.monitoring.alerts import find_alerts
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.terminal_view import draw_run
from tests.pretrain.monitoring.runs import write_run

FOLLOWED_SECONDS = 20
BARE = "import sys; print(open(sys.argv[1], 'rb').read().count(b'\\n'))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "long", (5 - step / lines for step in range(lines)), total=2 * lines)
        metrics = run / "metrics.jsonl"
        print(f"{lines:,} lines, {metrics.stat().st_size / 1e6:.0f} MB")
        for round_number in range(3):
            bare = _seconds([sys.executable, "-c", BARE, str(metrics)])
            ours = _seconds([sys.executable, "-m", "pretrain", "monitor", str(run), "--no-follow"])
            print(f"round {round_number}: bare read {bare:.2f} s, pretrain monitor {ours:.2f} s")
        print(f"following: {100 * _following(run):.1f}% of one core")


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _following(folder: Path) -> float:
    run = RunHistory(folder)
    console = Console(file=open(os.devnull, "w"), force_terminal=True, width=160, height=50)  # noqa: SIM115
    console.print(draw_run(run, find_alerts(run, time.time()), time.time(), width=160, chart_lines=14))
    last = (folder / "metrics.jsonl").read_bytes().splitlines()[-1] + b"\n"
    began, used = time.perf_counter(), 0.0
    while time.perf_counter() - began < FOLLOWED_SECONDS:
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(6 * last)
        before = time.process_time()
        run.refresh()
        now = time.time()
        console.print(draw_run(run, find_alerts(run, now), now, width=160, chart_lines=14))
        used += time.process_time() - before
        time.sleep(2)
    return used / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
