"""What surrounds ranks, with real processes: one wish for all, no orphan, the first failure's code and words."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch.processes import descendants, identity
from launch.rank_status import RankStatus, read_statuses
from launch.secrets_file import read_secrets
from pretrain.errors import ConfigError
from tests.launch import jobs

SMALL = "tests.launch.small_rank"
DEADLINE_SECONDS = 120
HERE = ("local", "torchrun", "accelerate", "deepspeed")  # back ends that start ranks on this machine


def agent(folder: Path, *words: str, ranks: int = 2, grace: float = 20, options: Sequence[str] = ()) -> list[str]:
    """One node's agent with small ranks."""
    place = ["--nodes", "1", "--node-rank", "0", "--ranks", str(ranks), "--address", "127.0.0.1", "--port", "1"]
    start = [sys.executable, "-m", "launch.node", *place, "--status", str(folder / "status"), "--grace", str(grace)]
    return [*start, *options, "--", SMALL, *words]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes = []

    def start(command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        processes.append(jobs.start(command, log=tmp_path / "log", changes=variables))
        return processes[-1]

    yield start
    for process in processes:
        jobs.end(process)


def ranks_ready(folder: Path, count: int = 2) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("ready-*"))) == count


def pids_of(folder: Path) -> set[int]:
    """Guardians, ranks, and the children of ranks."""
    statuses = read_statuses(folder / "status")
    children = {int(path.read_text(encoding="utf-8")) for path in folder.glob("child-*")}
    return {status.pid for status in statuses} | {status.guardian_pid for status in statuses} | children


def none_lives(pids: set[int]) -> bool:
    return not any(identity(pid) for pid in pids)


def by_rank(folder: Path) -> dict[int, RankStatus]:
    return {status.rank: status for status in read_statuses(folder / "status")}


def test_all_is_well(tmp_path: Path) -> None:
    written = jobs.run(agent(tmp_path, "say=RANK"), log=tmp_path / "log", deadline_seconds=DEADLINE_SECONDS)
    assert "RANK is 0" in written
    assert "RANK is 1" in written
    assert {status.code for status in by_rank(tmp_path).values()} == {0}
    assert (tmp_path / "status/rank-1.log").read_text(encoding="utf-8") == "RANK is 1\n"


def test_the_first_failure_gives_the_code_and_the_words(tmp_path: Path) -> None:
    words = [f"ready={tmp_path}/ready", "raise-if=1:CUDA out of memory. Tried to allocate 2 GiB", "sleep"]
    written = jobs.run(agent(tmp_path, *words), log=tmp_path / "log", expected=1, deadline_seconds=DEADLINE_SECONDS)
    paragraph = written[written.index("Rank 1 of 2") :]
    assert "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB" in paragraph
    assert f"Its log: {tmp_path}/status/rank-1.log" in paragraph
    assert "Likely cause: the GPU's memory is full" in paragraph
    assert "batch.micro_batch_size" in paragraph
    assert none_lives(pids_of(tmp_path))


@pytest.mark.parametrize("code", [7, 64, 70])
def test_the_exit_code_is_that_of_the_rank(code: int, tmp_path: Path) -> None:
    command = agent(tmp_path, f"fail-if=1:{code}", "sleep")
    jobs.run(command, log=tmp_path / "log", expected=code, deadline_seconds=DEADLINE_SECONDS)


def test_a_killed_rank_ends_the_others_and_is_named(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(agent(tmp_path, f"child={tmp_path}/child", f"ready={tmp_path}/ready", "sleep"))
    jobs.wait_for(ranks_ready(tmp_path))
    pids = pids_of(tmp_path)
    os.kill(by_rank(tmp_path)[1].pid, signal.SIGKILL)
    assert process.wait(DEADLINE_SECONDS) == 128 + signal.SIGKILL
    written = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Rank 1 of 2" in written
    assert "killed by SIGKILL" in written
    assert len(pids) == 6
    assert none_lives(pids)


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_wish_to_stop_reaches_all_ranks_at_once(
    wish: signal.Signals, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(agent(tmp_path, "saves", f"ready={tmp_path}/ready", "sleep"))
    jobs.wait_for(ranks_ready(tmp_path))
    process.send_signal(wish)
    assert process.wait(DEADLINE_SECONDS) == 75
    assert "state saved" in (tmp_path / "log").read_text(encoding="utf-8")
    # on a crowded machine a guardian may see the file of the wish before the signal
    assert {status.asked_to_stop for status in by_rank(tmp_path).values()} <= {"SIGTERM", "the launcher's wish"}


def test_what_does_not_stop_is_killed_after_the_grace(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(agent(tmp_path, "stubborn", f"ready={tmp_path}/ready", "sleep", grace=0.5))
    jobs.wait_for(ranks_ready(tmp_path))
    pids = pids_of(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == 128 + signal.SIGKILL
    assert none_lives(pids)


@pytest.mark.parametrize("victim", ["launcher", "guardian"])
def test_nothing_outlives_a_launcher_that_is_killed(
    victim: str, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    words = [f"child={tmp_path}/child", "stubborn", f"ready={tmp_path}/ready", "sleep"]
    process = started(agent(tmp_path, *words))
    jobs.wait_for(ranks_ready(tmp_path))
    pids = pids_of(tmp_path)
    assert len(pids) == 6
    assert not none_lives(pids)
    os.kill(process.pid if victim == "launcher" else by_rank(tmp_path)[0].guardian_pid, signal.SIGKILL)
    process.wait(DEADLINE_SECONDS)
    jobs.wait_for(lambda: none_lives(pids))


@pytest.mark.parametrize("backend", [*HERE[:3], pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_nothing_outlives_a_killed_launcher_whatever_it_starts(
    backend: str, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    words = [f"child={tmp_path}/child", "stubborn", f"ready={tmp_path}/ready", "sleep"]
    process = started(small_job(tmp_path, *words, backend=backend))
    jobs.wait_for(ranks_ready(tmp_path))
    pids = pids_of(tmp_path) | set(descendants(process.pid))
    assert len(pids) >= 6
    process.kill()
    process.wait(DEADLINE_SECONDS)
    jobs.wait_for(lambda: none_lives(pids))


@pytest.mark.parametrize("backend", HERE)
def test_ctrl_c_during_the_start_ends_it_in_order(
    backend: str, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(small_job(tmp_path, f"child={tmp_path}/child", "sleep", backend=backend))
    jobs.wait_for(lambda: descendants(process.pid))
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_SECONDS) == 75
    assert "before training had begun" in (tmp_path / "log").read_text(encoding="utf-8")
    assert none_lives(pids_of(tmp_path))


def test_the_stop_file_reaches_ranks_that_no_signal_reaches(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(agent(tmp_path, "saves", f"ready={tmp_path}/ready", "sleep"))
    jobs.wait_for(ranks_ready(tmp_path))
    (tmp_path / "status/stop").touch()
    assert process.wait(DEADLINE_SECONDS) == 75


@pytest.mark.parametrize("options", [[], ["--no-check"]])
def test_a_misspelt_key_is_told_before_the_start_and_by_the_rank(
    options: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    values = ["name=x", "run=launch/recipes/quickstart.yaml", "gpus_per_node=2", "accelerator=cpu"]
    values += [f"log_folder={tmp_path}/launch", "overrides=[optimizer.learning_rat=1e-3]"]
    command = [sys.executable, "-m", "launch", *values, "--on", "local", *options]
    written = jobs.run(command, log=tmp_path / "log", expected=64)
    assert "did you mean optimizer.learning_rate?" in written
    assert ("Likely cause: the configuration is wrong" in written) == bool(options)
    assert (tmp_path / "launch").exists() == bool(options)  # without the check, ranks were started
    told = written[written.index("Rank ") :] if options else written
    record_property(f"After a misspelt key{', unchecked' if options else ''}", told)


def small_job(folder: Path, *words: str, backend: str = "local", restarts: int = 2, limit: str = "1h") -> list[str]:
    """Two small ranks in the loop over starts."""
    start = [sys.executable, "-m", "tests.launch.small_job", str(folder / "status"), backend, str(restarts), limit]
    return [*start, *words]


def test_a_failure_that_a_new_start_mends_is_mended(tmp_path: Path) -> None:
    command = small_job(tmp_path, f"fail-once={tmp_path}/failed")
    written = jobs.run(command, log=tmp_path / "log", deadline_seconds=DEADLINE_SECONDS)
    assert "starting again in 1 s (1 of 2)" in written
    assert {status.attempt for status in by_rank(tmp_path).values()} <= {"1-0", "2-0"}


@pytest.mark.parametrize(("code", "starts"), [(7, 3), (64, 1), (70, 1)])
def test_only_what_a_new_start_may_mend_is_started_again(code: int, starts: int, tmp_path: Path) -> None:
    command = small_job(tmp_path, f"fail-if=0:{code}")
    written = jobs.run(command, log=tmp_path / "log", expected=code, deadline_seconds=DEADLINE_SECONDS)
    assert written.count("failed first") == starts


def test_who_was_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    """By a file or a signal of its own, which the launcher does not see: the next start would meet it again."""
    written = jobs.run(small_job(tmp_path, "fail-if=0:75"), log=tmp_path / "log", expected=75)
    assert "starting again" not in written


def test_a_signal_between_two_starts_ends_the_job(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = started(small_job(tmp_path, "fail-if=0:7", restarts=9))
    jobs.wait_for(lambda: "starting again in 2 s" in (tmp_path / "log").read_text(encoding="utf-8"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == 75


def test_the_time_limit_makes_ranks_save(tmp_path: Path) -> None:
    command = small_job(tmp_path, "saves", "sleep", limit="3s")
    jobs.run(command, log=tmp_path / "log", expected=75, deadline_seconds=DEADLINE_SECONDS)


CANARY = "canary-0123456789abcdef"


def test_secrets_reach_ranks_and_no_log(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"# of the tracker\nMY_TRACKER_TOKEN={CANARY}\n", encoding="utf-8")
    secrets.chmod(0o600)
    command = agent(tmp_path, "say=MY_TRACKER_TOKEN", "say=HOME", options=["--secrets", str(secrets)])
    written = jobs.run(command, log=tmp_path / "log", deadline_seconds=DEADLINE_SECONDS)
    assert "MY_TRACKER_TOKEN is [redacted]" in written  # it was there, or there would be None
    kept = [path.read_text(encoding="utf-8") for path in (tmp_path / "status").iterdir()]
    assert CANARY not in "".join([written, *kept])


def test_a_file_of_secrets_that_others_can_read_is_refused(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"A={CANARY}\nno variable {CANARY}\n", encoding="utf-8")
    secrets.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600") as refused:
        read_secrets(secrets)
    secrets.chmod(0o600)
    with pytest.raises(ConfigError, match="secrets:2 is no variable") as also_refused:
        read_secrets(secrets)
    assert CANARY not in f"{refused.value}{also_refused.value}"


def test_a_rank_that_starts_under_a_dead_launcher_does_not_stay(tmp_path: Path) -> None:
    """The launcher's pid is another process' by now: its identity is not watched, the parent is."""
    reading, writing = os.pipe()
    command = [
        sys.executable,
        "-m",
        "launch.rank",
        "--status",
        str(tmp_path),
        "--",
        SMALL,
        f"ready={tmp_path}/ready",
        "sleep",
    ]
    middle = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", middle], env=jobs.environment(), pass_fds=[writing])
    os.close(writing)
    try:
        jobs.wait_for(ranks_ready(tmp_path, 1))
        (status,) = read_statuses(tmp_path)
        process.kill()
        process.wait(DEADLINE_SECONDS)
        jobs.wait_for(lambda: none_lives({status.pid, status.guardian_pid}))
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def test_a_rank_whose_session_has_ended_is_not_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = [sys.executable, "-m", "launch.rank", "--status", tmp_path / "status", "--ends-with", "no-session"]
    written = jobs.run([*command, "--", SMALL, f"ready={started}"], log=tmp_path / "log", expected=129)
    assert "no-session, which started this rank, has ended" in written
    assert not Path(f"{started}-0").exists()
