"""What MLflow is told besides numbers: tags, files, parent, nodes, registered models, alerts. On real sqlite."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import RunConfig, save_config
from pretrain.errors import ConfigError
from pretrain.monitoring.alert_targets import AlertFeed, to_mlflow_tags
from pretrain.monitoring.alerts import Alert
from pretrain.monitoring.registration import register_export
from pretrain.monitoring.run_history import RunHistory
from pretrain.monitoring.tracked_names import mlflow_identity, tracker_state_of
from pretrain.reporting import node_metrics
from pretrain.reporting.node_metrics import NodeMetrics
from pretrain.reporting.reporter import Reporter, build_reporter
from pretrain.reporting.run_facts import RunFacts, environment_facts, git_facts
from pretrain.reporting.tracker_state import child_state, read_tracker_state

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.chdir(tmp_path)


def reported(config: RunConfig, folder: Path, state: dict[str, str] | None = None, *, nodes: int = 1) -> str:
    """A short run; its id on MLflow."""
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    facts = RunFacts(tags={"athanor.engine": "zero"}, texts={"data/train/web.json": "{}", "config.yaml": "name: x\n"})
    reporter = build_reporter(
        config,
        folder,
        is_main_process=True,
        resume_from=None,
        tracker_state=state or {},
        collect_facts=lambda: facts,
        nodes=nodes,
    )
    reporter.report(1, {"loss": 1.0})
    reporter.close(timeout_seconds=240)
    return read_tracker_state(folder)["mlflow_run_id"]


def client(tmp_path: Path) -> object:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")


def test_tags_files_and_the_parent_of_a_child(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(mlflow=True, tags={"team": "speech", "athanor.engine": "mine"})
    parent = reported(config, tmp_path / "first")
    child = reported(config, tmp_path / "second", child_state(read_tracker_state(tmp_path / "first"), Path("step-8")))
    assert child != parent
    run = client(tmp_path).get_run(child)  # type: ignore[attr-defined]
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["athanor.parent_checkpoint"] == "step-8"
    assert run.data.tags["team"] == "speech"
    assert run.data.tags["athanor.engine"] == "mine"  # the user's own word is the last
    assert run.data.tags["athanor.run_folder"] == str(tmp_path / "second")
    files = [file.path for file in client(tmp_path).list_artifacts(child)]  # type: ignore[attr-defined]
    assert files == ["config.yaml", "data"]
    assert "mlflow.parentRunId" not in client(tmp_path).get_run(parent).data.tags  # type: ignore[attr-defined]


def test_git_tells_commit_and_changes(tmp_path: Path) -> None:
    assert git_facts(tmp_path) == RunFacts()
    for words in (
        ["init", "-q", "-b", "trunk"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, timeout=60)
    clean = git_facts(tmp_path)
    assert clean.tags["athanor.git.changed"] == "false"
    assert clean.texts == {}
    (tmp_path / "new.py").write_text("x = 1\n")
    subprocess.run(["git", "-C", str(tmp_path), "add", "new.py"], check=True, timeout=60)
    changed = git_facts(tmp_path)
    assert (changed.tags["athanor.git.changed"], changed.tags["mlflow.source.git.branch"]) == ("true", "trunk")
    assert "+x = 1" in changed.texts["git/changes.diff"]


def test_the_environment_names_packages() -> None:
    texts = environment_facts().texts
    assert "\nmlflow==" in texts["environment/packages.txt"]
    assert texts["environment/machine.yaml"].startswith("python: ")


def test_another_node_writes_its_metrics_into_the_same_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_metrics, "LOOK_SECONDS", 0.05)
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    node = NodeMetrics(folder, lambda: uri, "node-1")  # before the run is known
    reporter = build_reporter(
        make_config(mlflow=True), folder, is_main_process=True, resume_from=None, tracker_state={}, nodes=2
    )
    reporter.report(1, {"loss": 1.0})
    deadline, names = time.monotonic() + 240, ("system/node-0/cpu", "system/node-1/cpu")
    while not all(any(metric.startswith(name) for metric in metrics_of_run(reporter, tmp_path)) for name in names):
        assert time.monotonic() < deadline, "a node is missing"
        time.sleep(0.3)
    node.close(timeout_seconds=60)
    reporter.close(timeout_seconds=240)


def metrics_of_run(reporter: Reporter, tmp_path: Path) -> list[str]:
    run_id = reporter.tracker_state().get("mlflow_run_id")
    return list(client(tmp_path).get_run(run_id).data.metrics) if run_id else []  # type: ignore[attr-defined]


def test_an_exported_model_becomes_a_version_that_knows_its_run(make_config: MakeConfig, tmp_path: Path) -> None:
    run_id = reported(make_config(mlflow=True), tmp_path / "run")
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    for number, source in enumerate((tmp_path / "run", checkpoint), 1):
        assert register_export(source, exported, 8 * number, "speech") == f"registered as version {number} of speech"
    version = client(tmp_path).get_model_version("speech", "2")  # type: ignore[attr-defined]
    assert (version.run_id, version.tags["athanor.step"]) == (run_id, "16")
    found = client(tmp_path).download_artifacts(run_id, "model/step-00000016")  # type: ignore[attr-defined]
    assert (Path(found) / "config.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="in no run folder"):
        register_export(exported, exported, 1, "speech")


def test_alerts_become_tags(make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_id = reported(make_config(mlflow=True), tmp_path / "run")
    history = RunHistory(tmp_path / "run")
    feed = AlertFeed("tiny", [to_mlflow_tags(mlflow_identity(history, tracker_state_of(history)))])
    feed.tell([Alert("spike", 7, "loss 9"), Alert("slow rank", 8, "rank 3")])
    feed.tell([Alert("spike", 9, "loss 12")])
    tags = client(tmp_path).get_run(run_id).data.tags  # type: ignore[attr-defined]
    assert tags["athanor.alert.spike"] == "step 9: loss 12"
    assert tags["athanor.alert.slow_rank"] == "step 8: rank 3"
    state = {"run_key": "of-nobody"}
    AlertFeed("tiny", [to_mlflow_tags(mlflow_identity(history, state))]).tell([Alert("spike", 7, "loss 9")])
    assert "MLflow does not know the run yet" in caplog.text
