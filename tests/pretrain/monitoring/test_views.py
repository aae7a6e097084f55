from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pretrain.__main__ import app, run_command_line
from pretrain.monitoring.html_page import write_page
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.text_chart import draw_chart, thin
from pretrain.reporting.metrics_file import MetricsFile
from pretrain.reporting.record import Record
from tests.pretrain.monitoring.runs import BEGAN, write_run

CHROMIUM = shutil.which("chromium")


def test_a_chart_falls_from_its_highest_to_its_lowest_value() -> None:
    lines = draw_chart(np.arange(100.0), 10 - np.arange(100.0) / 11, width=40, height=5)
    assert len(lines) == 5
    assert all(len(line) <= 40 for line in lines)
    assert lines[0].split()[0] == "10"
    assert lines[-1].split()[0] == "1"
    inked = [[place for place, dot in enumerate(line[10:]) if dot != "\u2800"] for line in lines]
    assert inked[0][0] == 0
    assert inked[-1][-1] == 29
    assert all(above[-1] <= below[-1] for above, below in zip(inked, inked[1:], strict=False))


def test_a_chart_of_nothing_says_so() -> None:
    assert draw_chart(np.array([1.0]), np.array([math.nan]), width=40, height=5) == ["nothing to draw yet"]


def test_thinning_keeps_the_peaks() -> None:
    values = np.zeros(10_000)
    values[777], values[5555] = 9.0, -9.0
    steps, kept = thin(np.arange(10_000.0), values, 100)
    assert len(steps) <= 110
    assert {9.0, -9.0} <= set(kept.tolist())


def test_the_terminal_shows_where_a_run_stands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", [4.0 - step / 300 for step in range(250)])
    result = CliRunner().invoke(app, ["monitor", str(run)])
    assert result.exit_code == 0, result.output
    for expected in ("tiny", "step 250 of 1,000", "25.0%", "throughput 100 tokens/s", "silent"):
        assert expected in result.output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["monitor", str(tmp_path)]) == 64
    assert "holds neither config.yaml nor metrics.jsonl" in capsys.readouterr().err


def test_the_page_compares_runs_and_escapes_their_names(tmp_path: Path) -> None:
    losses = [4.0 - step / 300 for step in range(250)]
    runs = [write_run(tmp_path / name, losses) for name in ("first", "<img src=x onerror=alert(1)>")]
    page = tmp_path / "page.html"
    assert run_command_line(["monitor", *map(str, runs), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    body = text[text.index("</script></head>") :]
    assert "first" in body
    assert "<img src=x" not in body
    assert "&lt;img src=x onerror=alert(1)&gt;" in body
    assert body.count("<h2>Loss</h2>") == 1
    assert "http" not in body.split("<script", 1)[0]  # nothing is fetched


def test_the_page_counts_saves_that_are_kept_no_longer(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", [4.0 - step / 300 for step in range(250)])
    file = MetricsFile(folder / "metrics.jsonl")
    for step in (50, 100, 100, 200):  # one told twice, as after a restart
        file.append(Record(step=step + 1, time=BEGAN + step, values={"checkpoint/step": step}))
    file.close()
    (folder / "checkpoints" / "step-00000200").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000200" / "manifest.json").write_text("{}", encoding="utf-8")
    run = RunHistory(folder)
    assert run.saved_steps().tolist() == [50, 100, 200]
    write_page([run], tmp_path / "page.html", BEGAN + 300)
    assert "<td>3, 1 kept</td>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page_without_an_error(tmp_path: Path) -> None:
    run = RunHistory(write_run(tmp_path / "tiny", [4.0 - step / 300 for step in range(250)]))
    write_page([run], tmp_path / "page.html", BEGAN + 300)
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    result = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'browser'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=15000",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        check=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, HOME=str(tmp_path)),
    )
    assert result.stdout.count('class="main-svg"') >= 5
    assert "CONSOLE" not in result.stderr
    assert sys.getsizeof(result.stdout) > 5_000_000
