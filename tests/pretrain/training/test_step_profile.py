"""`pretrain profile` on one and two ranks: parts add up, the costly operator is named, a trace is written."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.engines.step_parts import StepParts
from pretrain.training.step_profile import DATA, PARTS, STEP, profile_lines, read_step_profile
from tests.distributed.ranks import run_on_ranks
from tests.launch import jobs
from tests.pretrain.data.datasets import write_documents


def test_parts_of_a_step_add_up_and_the_costly_operator_is_named() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    parts = StepParts(torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function(STEP):
                with record_function(DATA):
                    batch = torch.rand(1024, 256)
                with parts.part("forward_backward"):
                    (batch @ weight).square().sum().backward()
                with parts.part("optimizer"):
                    time.sleep(0.02)  # no operator: Python's
                    optimizer.step()
    found = read_step_profile(profiler, 2)
    assert found.steps == 2
    assert sum(found.host_seconds.values()) == pytest.approx(found.step_seconds, rel=0.01)
    assert set(found.host_seconds) == set(PARTS)
    for part in ("data", "forward", "backward", "optimizer"):
        assert found.host_seconds[part] > 0, part
    assert found.host_seconds["communication"] == 0
    assert found.host_seconds["optimizer"] >= 0.02
    multiplied = {operator.name: operator for operator in found.operators}["aten::mm"]
    assert multiplied.calls == 2  # forward, and the gradient of the weight
    assert "aten::mm" in "\n".join(profile_lines(found))
    seconds = parts.read()
    assert seconds["optimizer"] >= 0.04
    assert set(seconds) == {"forward_backward", "optimizer"}
    assert parts.read() == {}


def profile_words(words: list[str]) -> int:
    from pretrain import distributed
    from pretrain.__main__ import run_command_line

    stop = distributed.stop
    distributed.stop = lambda: None  # the test's process group stays
    try:
        return run_command_line(words)
    finally:
        distributed.stop = stop


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(1, {"engine": "plain"}, marks=pytest.mark.slow),
        pytest.param(2, {"engine": "zero", "zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"engine": "pipeline", "pipeline": 2, "zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"engine": "accelerate"}, marks=pytest.mark.slow),
    ],
)
def test_the_command_on_ranks(tmp_path: Path, ranks: int, parallel: dict[str, object]) -> None:
    write_documents(tmp_path / "text", [list(range(1, 17))] * 64, vocabulary_size=512)
    run = tmp_path / "run.yaml"
    jobs.write_tiny_run(
        run,
        data=tmp_path,
        batch={"sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 4},
        schedule={"name": "cosine", "warmup_steps": 3, "total_steps": 30},
        parallel=parallel,
        precision="fp32",
    )
    output = tmp_path / "profile"
    words = ["profile", str(run), f"data.train={tmp_path / 'text'}", "data.validation={}", "--output", str(output)]
    results = run_on_ranks(ranks, told_lines, words)
    code, text = results[0]
    assert code == 0, text
    assert re.search(rf"^engine {parallel['engine']}, {ranks} ranks", text, re.MULTILINE)
    for part in PARTS:
        assert re.search(rf"^{part} +[\d.,]+ +[\d.]+%", text, re.MULTILINE), part
    assert re.search(r"^aten::\w+ +[\d.]+ +[\d.]+", text, re.MULTILINE)
    for rank in range(ranks):
        trace = json.loads(gzip.decompress((output / f"trace-rank-{rank}.json.gz").read_bytes()))
        assert any(event.get("name") == STEP for event in trace["traceEvents"])
    if parallel["engine"] == "zero":
        assert re.search(r"fwd flops per GPU: .*[1-9]", text)
        assert re.search(r"all_?reduce\w* +[\d,]+ B +[\d.]+ calls", text)
    if parallel["engine"] == "pipeline":
        assert "it fails under pipelines" in text
    if ranks > 1:
        code, text = results[1]
        assert code == 0
        assert "ms a step" not in text  # rank 0 alone tells


def told_lines(words: list[str]) -> tuple[int, str]:
    """Exit code, and what the command printed."""
    import contextlib
    import io

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = profile_words(words)
    return code, told.getvalue()


def test_more_steps_than_the_run_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.__main__ import run_command_line

    run = tmp_path / "run.yaml"
    jobs.write_tiny_run(run, data=tmp_path, schedule={"name": "constant", "total_steps": 4})
    assert run_command_line(["profile", str(run), "--steps", "9"]) == 64
    assert "--warmup 3 --steps 9 of a run of 4" in capsys.readouterr().err
