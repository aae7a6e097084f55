"""MLflow for real, on sqlite and on addresses that are dead or never answer: one run, no duplicates, no waiting."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import RunConfig
from pretrain.reporting.metrics_file import read_metrics
from pretrain.reporting.mlflow_run import PARAM_CHARACTERS, flatten, legal_name
from pretrain.reporting.reporter import Reporter, build_reporter

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _quiet_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def start(config: RunConfig, *, resume_from: int | None = None, state: dict[str, str] | None = None) -> Reporter:
    return build_reporter(config, Path("run"), is_main_process=True, resume_from=resume_from, tracker_state=state or {})


def report(reporter: Reporter, steps: range) -> None:
    for step in steps:
        reporter.report(step, {"loss": 10.0 / step, "bits@byte": float("nan") if step == 2 else 1.0})
        if step % 4 == 0:
            reporter.report(step, {"validation/main/loss": 11.0 / step})


def wait_until(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def run_ids(client: object, experiment: str = "athanor") -> list[str]:
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])  # type: ignore[attr-defined]
    return [run.info.run_id for run in found]


def test_a_resumed_run_is_one_run_with_every_step_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    reporter = start(make_config(mlflow=True))
    report(reporter, range(1, 11))
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    wait_until(lambda: "mlflow_run_id" in reporter.tracker_state())
    run_id = reporter.tracker_state()["mlflow_run_id"]
    wait_until(lambda: any(name.startswith("system/cpu") for name in client.get_run(run_id).data.metrics))
    reporter.close(outcome="stopped")
    first = client.get_run(run_id)
    assert first.info.status == "KILLED"
    assert first.data.params["optimizer.learning_rate"] == "0.001"
    assert first.data.params["reporting.mlflow"] == "true"
    assert "reporting.mlflow_uri" not in first.data.params

    changed = make_config(mlflow=True)
    changed = changed.model_copy(update={"seed": 5})
    again = start(changed, resume_from=8, state=reporter.tracker_state())
    report(again, range(9, 13))
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING")
    again.close()
    assert run_ids(client) == [run_id]
    for name, steps in (("loss", range(1, 13)), ("bits_byte", range(1, 13)), ("validation/main/loss", range(4, 13, 4))):
        assert sorted(metric.step for metric in client.get_metric_history(run_id, name)) == list(steps)
    last = client.get_run(run_id)
    assert last.info.status == "FINISHED"
    assert last.data.params["seed"] == "0"
    assert last.data.tags["athanor.changed_parameters"] == '{"seed":"5"}'


def test_a_run_whose_id_no_checkpoint_knows_is_found_by_its_key(make_config: MakeConfig) -> None:
    from mlflow import MlflowClient

    config = make_config(mlflow=True)
    first = start(config)
    state = first.tracker_state()  # as a checkpoint saved before MLflow answered has it
    assert "mlflow_run_id" not in state
    report(first, range(1, 3))
    first.close()
    second = start(config, resume_from=2, state=state)
    report(second, range(3, 4))
    second.close()
    (run_id,) = run_ids(MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db"))
    assert second.tracker_state()["mlflow_run_id"] == run_id


def test_a_run_that_the_server_lost_becomes_a_new_one(make_config: MakeConfig) -> None:
    from mlflow import MlflowClient

    reporter = start(make_config(mlflow=True), resume_from=4, state={"run_key": "k", "mlflow_run_id": "0" * 32})
    report(reporter, range(5, 6))
    reporter.close()
    (run_id,) = run_ids(MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db"))
    database = f"sqlite:///{Path.cwd()}/mlflow.db"
    assert reporter.tracker_state() == {"run_key": "k", "mlflow_run_id": run_id, "mlflow_database": database}


def test_a_server_that_never_answers_holds_nobody_up(
    make_config: MakeConfig, silent_server: tuple[str, threading.Event], caplog: pytest.LogCaptureFixture
) -> None:
    uri, connected = silent_server
    reporter = start(make_config(mlflow=True, mlflow_uri=uri))
    report(reporter, range(1, 6))
    assert connected.wait(60)
    report(reporter, range(6, 21))  # each would wait for MLflow's 120 s if it went through it
    reporter.close(timeout_seconds=0.0)
    assert [line["step"] for line in read_metrics(Path("run/metrics.jsonl")) if "loss" in line] == list(range(1, 21))
    assert re.search(r"mlflow: no answer for \d+ s, 25 lines were not delivered; metrics.jsonl has them", caplog.text)
    assert "mlflow_run_id" not in reporter.tracker_state()


def test_a_dead_address_is_told_once_and_training_goes_on(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    reporter = start(make_config(mlflow=True, mlflow_uri=f"http://me:secret@{address}"))
    report(reporter, range(1, 21))
    reporter.close()
    assert len(list(read_metrics(Path("run/metrics.jsonl")))) == 25
    assert reporter.dropped() == {"mlflow": 25}
    told = [text for text in caplog.messages if text.startswith("mlflow fails") and "refused" in text]
    assert len(told) == 1
    assert "secret" not in told[0]


def test_parameters_are_flat_and_within_mlflows_limits() -> None:
    flat = flatten(
        {"data": {"train": [{"path": "a"}], "validation": {"my set!": "b"}}, "seed": 3, "x": None, "t": "y" * 9000}
    )
    assert flat.pop("t") == "y" * PARAM_CHARACTERS
    assert flat == {"data.train": '[{"path":"a"}]', "data.validation.my set_": "b", "seed": "3", "x": "null"}
    assert legal_name("a/b c:d-e.f_g@é") == "a/b c:d-e.f_g__"
