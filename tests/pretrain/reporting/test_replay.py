"""`pretrain track --replay`: every point of metrics.jsonl in every tracker exactly once, whatever happened before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pretrain.config import RunConfig, save_config
from pretrain.errors import ConfigError
from pretrain.monitoring.track import TrackerError, track
from pretrain.reporting.metrics_file import read_metrics
from pretrain.reporting.reporter import Reporter, build_reporter
from pretrain.reporting.tracker_state import read_tracker_state

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _quiet_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def begin(
    config: RunConfig, folder: Path, *, resume_from: int | None = None, state: dict[str, str] | None = None
) -> Reporter:
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    return build_reporter(config, folder, is_main_process=True, resume_from=resume_from, tracker_state=state or {})


def report(reporter: Reporter, steps: range) -> None:
    for step in steps:
        reporter.report(step, {"loss": 10.0 / step, "bits@byte": float("nan") if step == 2 else 1.0})
        if step % 4 == 0:
            reporter.report(step, {"validation/main/loss": 11.0 / step, "grad_norm": float("inf")})


def look(folder: Path, *trackers: str, replay: bool = False, uri: str | None = None) -> tuple[list[str], bool]:
    told: list[str] = []
    is_whole = track([folder], trackers=trackers, mlflow_uri=uri, is_replay=replay, tell=told.append)
    return told, is_whole


def mlflow_steps(uri: str, run_id: str, name: str) -> list[int]:
    from mlflow import MlflowClient

    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(run_id, name))


def test_an_outage_leaves_a_gap_that_replay_fills_once(make_config: MakeConfig, tmp_path: Path) -> None:
    """The first process reports into MLflow, the second one's MLflow is dead, and it resumes below the kill."""
    folder = tmp_path / "run"
    first = begin(make_config(mlflow=True), folder)
    report(first, range(1, 11))
    first.close(outcome="stopped")
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    second = begin(make_config(mlflow=True, mlflow_uri=dead), folder, resume_from=8, state=first.tracker_state())
    report(second, range(9, 21))
    second.close()
    assert second.dropped() == {"mlflow": 15}

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = read_tracker_state(folder)["mlflow_run_id"]
    total = sum(len(line) - 2 for line in read_metrics(folder / "metrics.jsonl"))
    (line,), is_whole = look(folder, "mlflow", uri=uri)
    assert not is_whole
    assert f"run: mlflow run {run_id}: {total} points" in line.replace("tiny", "run")
    for _ in range(2):
        (line,), is_whole = look(folder, "mlflow", uri=uri, replay=True)
        assert is_whole, line
        for name, steps in (("loss", range(1, 21)), ("bits_byte", range(1, 21)), ("grad_norm", range(4, 21, 4))):
            assert mlflow_steps(uri, run_id, name) == list(steps)
    assert "0 missing" not in line
    assert "missing" not in line
    assert look(folder, "mlflow", uri=uri)[1]


def test_the_database_of_a_run_is_found_from_another_folder(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = begin(make_config(mlflow=True), tmp_path / "run")
    report(reporter, range(1, 3))
    reporter.close()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert look(tmp_path / "run")[1]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_database_that_was_lost_is_filled_anew_under_the_same_key(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reporter = begin(make_config(mlflow=True), folder)
    report(reporter, range(1, 9))
    reporter.close()
    before = read_tracker_state(folder)
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm"):
        with suppress(FileNotFoundError):
            (tmp_path / name).unlink()
    uri = f"sqlite:///{tmp_path}/new.db"
    assert not look(folder, "mlflow", uri=uri)[1]
    assert look(folder, "mlflow", uri=uri, replay=True)[1]
    after = read_tracker_state(folder)
    assert after["run_key"] == before["run_key"]
    assert after["mlflow_run_id"] != before["mlflow_run_id"]
    assert mlflow_steps(uri, after["mlflow_run_id"], "loss") == list(range(1, 9))


def test_tensorboard_is_written_anew_where_it_differs_and_left_alone_where_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    reporter = begin(make_config(tensorboard=True), folder)
    report(reporter, range(1, 9))
    reporter.close()
    again = begin(make_config(tensorboard=True), folder, resume_from=4, state=reporter.tracker_state())
    report(again, range(5, 13))
    again.close()
    assert look(folder, "tensorboard") == (["tiny: tensorboard: 30 points, all there, each once"], True)
    files = sorted((folder / "events").iterdir())
    assert len(files) == 2
    assert look(folder, "tensorboard", replay=True)[1]
    assert sorted((folder / "events").iterdir()) == files

    files[0].unlink()
    (line,), is_whole = look(folder, "tensorboard")
    assert not is_whole
    assert "10 missing: mend with --replay" in line
    assert look(folder, "tensorboard", replay=True)[1]
    assert look(folder, "tensorboard") == (["tiny: tensorboard: 30 points, all there, each once"], True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.wall_time for event in events.Scalars("loss")] == [
        line["time"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line
    ]


def test_files_of_a_run_that_trains_are_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    from pretrain.checkpoint.run_lock import RunLock

    folder = tmp_path / "run"
    reporter = begin(make_config(), folder)
    report(reporter, range(1, 3))
    with RunLock(folder), pytest.raises(TrackerError, match="is another run's"):
        look(folder, "tensorboard", replay=True)
    reporter.close()
    assert look(folder, "tensorboard", replay=True)[1]
    assert (folder / "trackers.json").exists()


def test_wandb_offline_files_hold_every_step_once_after_replay(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    reporter = begin(make_config(wandb=True), folder)
    report(reporter, range(1, 7))
    reporter.close(timeout_seconds=240)
    assert look(folder, "wandb") == (
        [f"tiny: wandb run {reporter.tracker_state()['run_key']}: 14 points, all there, each once"],
        True,
    )
    silent = begin(make_config(), folder, resume_from=6, state=reporter.tracker_state())  # what W&B never heard of
    report(silent, range(7, 13))
    silent.close()
    (line,), is_whole = look(folder, "wandb")
    assert not is_whole
    assert "16 missing" in line
    assert look(folder, "wandb", replay=True)[1]
    (line,), is_whole = look(folder, "wandb")
    assert is_whole, line
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert len(list((folder / "wandb-replaced").iterdir())) == 1


def test_an_older_run_folder_without_names_of_trackers_gets_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    """As written before trackers.json, with keys in config.yaml that are gone and lines without new values."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: old\nreporting: {mlflow: true, gone_key: 3}\nalso_gone: {}\n")
    (folder / "metrics.jsonl").write_text('{"step":1,"time":1.5,"loss":2.0}\n{"step":2,"time":2.5,"loss":1.0}\n')
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        assert look(folder, replay=True, uri=uri)[1]
    assert mlflow_steps(uri, read_tracker_state(folder)["mlflow_run_id"], "loss") == [1, 2]


def test_a_half_written_last_line_is_left_out_and_the_rest_sent(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reporter = begin(make_config(tensorboard=True), folder)
    report(reporter, range(1, 4))
    reporter.close()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":4,"time":1.0,"lo')
    assert look(folder, "tensorboard") == (["tiny: tensorboard: 6 points, all there, each once"], True)


def test_folders_without_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither"):
        look(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="has no metrics.jsonl"):
        look(tmp_path)
    with pytest.raises(ConfigError, match="--to neptune"):
        look(tmp_path, "neptune")


def test_a_tracker_that_fails_does_not_keep_the_next_one_waiting(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reporter = begin(make_config(), folder)
    report(reporter, range(1, 3))
    reporter.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://me:secret@127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TrackerError, match="(?s)mlflow fails .*metrics.jsonl keeps everything") as caught:
        look(folder, "mlflow", "tensorboard", replay=True, uri=dead)
    assert "secret" not in str(caught.value)
    assert look(folder, "tensorboard")[1]


def test_a_server_that_never_answers_is_given_up(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: tuple[str, threading.Event]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    folder = tmp_path / "run"
    reporter = begin(make_config(), folder)
    report(reporter, range(1, 3))
    reporter.close()
    with pytest.raises(TrackerError, match="mlflow fails"):
        look(folder, "mlflow", replay=True, uri=silent_server[0])


@contextmanager
def mlflow_server(port: int, folder: Path) -> Iterator[str]:
    """A real server on sqlite."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    log = (folder / "server.log").open("ab")
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
                break
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server never came up"
            time.sleep(0.3)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers are its children, in a session of their own
        server.wait(60)
        log.close()


@contextmanager
def late_proxy(target: int, seconds: float) -> Iterator[str]:
    """Passes connections on to a port of this machine after so long."""

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=connect, args=(client,), daemon=True).start()

    def connect(client: socket.socket) -> None:
        time.sleep(seconds)
        with client, socket.create_connection(("127.0.0.1", target)) as server:
            answers = threading.Thread(target=pass_on, args=(server, client), daemon=True)
            answers.start()
            pass_on(client, server)
            answers.join(60)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.slow
def test_a_real_server_that_answers_late_holds_nobody_up(make_config: MakeConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    with mlflow_server(port, tmp_path) as uri, late_proxy(port, seconds=30.0) as late:
        reporter = begin(make_config(mlflow=True, mlflow_uri=late), folder)
        report(reporter, range(1, 201))
        # had one line waited for the server, MLflow would know the run by now
        assert "mlflow_run_id" not in reporter.tracker_state()
        assert len([line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]) == 200
        reporter.close(timeout_seconds=0.0)
        assert look(folder, "mlflow", replay=True, uri=uri)[1]
        run_id = read_tracker_state(folder)["mlflow_run_id"]
        assert mlflow_steps(uri, run_id, "loss") == list(range(1, 201))


@pytest.mark.slow
def test_a_real_server_that_dies_and_comes_back_loses_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    with mlflow_server(port, tmp_path) as uri:
        reporter = begin(make_config(mlflow=True, mlflow_uri=uri), folder)
        report(reporter, range(1, 9))
        deadline = time.monotonic() + 120
        while "mlflow_run_id" not in reporter.tracker_state():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    report(reporter, range(9, 17))  # into the outage
    reporter.close(timeout_seconds=20)
    with mlflow_server(port, tmp_path) as uri:
        run_id = read_tracker_state(folder)["mlflow_run_id"]
        assert look(folder, "mlflow", replay=True)[1]
        assert look(folder, "mlflow")[1]
        for name, steps in (("loss", range(1, 17)), ("validation/main/loss", range(4, 17, 4))):
            assert mlflow_steps(uri, run_id, name) == list(steps)
