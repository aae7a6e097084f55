"""What the doctor finds: each fault made for real where that is possible, seen by its check."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.doctor import accelerators, access, machine, network
from pretrain.doctor.finding import Finding, merged, outliers, run_checks
from pretrain.doctor.secrets import is_secret, without_secrets
from tests.distributed.ranks import REPOSITORY
from tests.launch import jobs

DOCTOR = [sys.executable, "-m", "pretrain", "doctor"]


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def test_installed_versions_fit() -> None:
    (finding,) = machine.check_versions()
    assert finding.level == "green", finding.text
    assert "torch" in finding.values


def test_a_missing_package_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.metadata, "requires", lambda name: ["torch>=99", "no-such-package-of-ours>=1"])
    (finding,) = machine.check_versions()
    assert finding.level == "red"
    assert "torch" in finding.text
    assert "no-such-package-of-ours is missing" in finding.text


def test_few_open_files_are_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = list(machine.check_limits())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert levels(found)["open files"] == "yellow"
    assert next(finding for finding in found if finding.name == "open files").fix


def test_secrets_are_named_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    canary = "canary-value"
    (worst,) = machine.check_secrets({"MLFLOW_TRACKING_TOKEN": canary, "HF_TOKEN": canary}, tmp_path)
    assert worst.level == "red"
    (warning,) = machine.check_secrets({"HF_TOKEN": canary}, tmp_path)
    assert (warning.level, "HF_TOKEN" in warning.text) == ("yellow", True)
    (tmp_path / ".deepspeed_env").write_text(f"HF_TOKEN={canary}\n", encoding="utf-8")
    found = [worst, warning, *machine.check_secrets({}, tmp_path)]
    assert any(".deepspeed_env" in finding.text for finding in found)
    assert canary not in json.dumps([finding.to_json() for finding in found])


def test_a_lock_that_nobody_holds_is_red_and_one_that_is_held_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "op/lock"
    lock.parent.mkdir()
    lock.touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    assert "red" in levels(list(machine.check_compiler_cache(environment))).values()
    with lock.open():
        assert "red" not in levels(list(machine.check_compiler_cache(environment))).values()


def test_too_little_room_for_the_checkpoints_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 2**22)
    found = levels(list(machine.check_disk(tmp_path / "not/yet/there", 2**60, 3)))
    assert found["disk space"] == "red"
    assert found["disk speed"] in ("green", "yellow")
    assert levels(list(machine.check_disk(tmp_path, 1, 3)))["disk space"] == "green"


def test_a_slow_disk_is_told_by_fewer_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_PIECE_BYTES", 2**16)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.01)
    pieces: list[int] = []
    monkeypatch.setattr(machine.os, "fdatasync", lambda descriptor: pieces.append(descriptor) or time.sleep(0.02))
    found = list(machine.check_disk(tmp_path, None, 0))
    assert len(pieces) == 1
    assert levels(found)["disk speed"] == "yellow"
    assert list(tmp_path.iterdir()) == []


def test_hosts_that_are_options_or_do_not_answer_are_red(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("-oProxyCommand=touch slots=8\nno-such-host.invalid slots=8\n", encoding="utf-8")
    found = list(access.check_hostfile(hostfile, None))
    assert [finding.level for finding in found].count("red") == 2
    assert any("hosts:1" in finding.text for finding in found)
    assert levels(found)["ssh"] == "red"


def test_attention_is_right_here_and_a_wrong_one_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert levels(list(accelerators.check_attention()))["sdpa"] == "green"
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: right(*a, **k) * 1.1)
    assert levels(list(accelerators.check_attention()))["sdpa"] == "red"


def test_a_fused_optimizer_that_is_wrong_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert levels(list(accelerators.check_fused_optimizer()))["fused AdamW"] == "green"
    right = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, fused, foreach: right(weights, lr=lr * (1 + fused)))
    assert levels(list(accelerators.check_fused_optimizer()))["fused AdamW"] == "red"


class Nvml:
    """What the driver's library says of two GPUs with three links each; the machine of these tests has none."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonSwThermalSlowdown = 8, 32
    NVMLError = LookupError

    def __init__(self, *, errors: int | None = 0, reasons: int = 0, down: int | None = None) -> None:
        self.errors, self.reasons, self.down = errors, reasons, down

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, since: int) -> int:
        if self.errors is None:
            raise LookupError("not supported")
        return self.errors if handle == 1 else 0

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return 1200

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link == 3:
            raise LookupError("no such link")
        return int(link != self.down)


@pytest.mark.parametrize(
    ("library", "reds", "green"),
    [
        (Nvml(), {}, "no clock held down, no uncorrected errors of memory, 6 NVLinks up"),
        (Nvml(errors=2), {"ECC": "GPU 1: 2 uncorrected errors"}, "no clock held down, 6 NVLinks up"),
        (Nvml(errors=None, down=1), {"NVLink": "GPU 1: 1 of 3 links are down"}, "errors of memory told by 0 of 2"),
        (Nvml(reasons=8 | 64), {"clocks": "GPU 1: held at 1200 of 1200 MHz"}, "6 NVLinks up"),
    ],
    ids=["healthy", "memory", "link", "clock"],
)
def test_the_health_of_gpus_is_told_good_or_bad(library: Nvml, reds: dict[str, str], green: str) -> None:
    found = list(accelerators._health(library, 2))
    assert {finding.name: finding.text for finding in found if finding.level == "red"} == reds
    assert green in found[-1].text
    assert found[-1].level == "green"


# what the issue of the doctor names, and what one process on a machine without GPUs says of it
NAMED = {
    *("versions", "GPUs", "sdpa", "flash-attn", "fused AdamW", "compiler cache", "shared memory", "open files"),
    *("locked memory", "network", "matrix product", "disk speed", "disk space", "clocks of nodes", "data", "hostfile"),
    "secrets",
}


def report_with_a_stale_lock(command: list[str], folder: Path) -> dict[str, Any]:
    """The doctor's JSON where one thing is red for certain, whatever else this machine lacks."""
    (folder / "cache/op").mkdir(parents=True)
    (folder / "cache/op/lock").touch()
    changes = {"TORCH_EXTENSIONS_DIR": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)}
    written = jobs.run([*command, "--json"], log=folder / "log", folder=folder, changes=changes, expected=None)
    report: dict[str, Any] = json.loads(written[written.index("{\n") : written.rindex("\n}") + 2])
    return report


def test_one_process_says_something_of_every_check(tmp_path: Path) -> None:
    report = report_with_a_stale_lock(DOCTOR, tmp_path)
    assert {finding["name"] for finding in report["findings"]} == NAMED
    assert all(finding["text"] for finding in report["findings"])
    skipped = {finding["name"] for finding in report["findings"] if finding["level"] == "skipped"}
    assert {"network", "clocks of nodes", "data", "hostfile"} <= skipped


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> list[Finding]:
        raise OSError("no such device")

    found = list(run_checks({"first": broken, "second": machine.check_versions}))  # type: ignore[dict-item]
    assert [finding.level for finding in found] == ["red", "green"]
    assert "no such device" in found[0].text


def test_equal_findings_of_nodes_are_one_line_and_the_worst_comes_first() -> None:
    fine, bad = Finding(name="a", level="green", text="x"), Finding(name="b", level="red", text="y")
    report = merged({"node-1": [fine], "node-2": [fine, bad]})
    assert [(finding.name, finding.nodes) for finding in report] == [("b", ("node-2",)), ("a", ("node-1", "node-2"))]


def test_outliers_need_a_majority() -> None:
    assert outliers({"a": 1.0, "b": 100.0}, 0.5) == []
    assert outliers({"a": 40.0, "b": 100.0, "c": 101.0}, 0.5) == ["a"]


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


def test_what_only_looks_like_a_secret_is_none() -> None:
    assert not any(is_secret(name) for name in ("TOKENIZERS_PARALLELISM", "MASTER_PORT", "NCCL_IB_HCA", "PATH"))
    assert is_secret("TRACKER", "https://me:hidden@host/path")
    assert without_secrets("a https://me:hidden@host b", []) == "a https[redacted]host b"


@pytest.mark.ranks
def test_two_ranks_measure_each_other_and_give_one_report(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={jobs.free_port()}"]
    report = report_with_a_stale_lock([*command, "-m", *DOCTOR[2:]], tmp_path)
    assert (report["level"], report["ranks"]) == ("red", 2)
    by_name = {finding["name"]: finding for finding in report["findings"] if finding["level"] != "red"}
    assert list(by_name["network"]["values"]["bytes_per_second"]) != []
    assert by_name["network"]["values"]["all_reduce_bytes_per_second"] > 0
    assert len(by_name["matrix product"]["values"]["flops"]) == 2
    assert by_name["GPUs"]["level"] == "skipped"
    assert [finding["name"] for finding in report["findings"] if finding["level"] == "red"] == ["compiler cache"]


def test_rounds_meet_every_pair_once() -> None:
    for size in (2, 4, 6, 8):
        met = set()
        circle = list(range(size))
        for _ in range(size - 1):
            met |= {frozenset((circle[index], circle[size - 1 - index])) for index in range(size)}
            circle = network.turned(circle)
        assert len(met) == size * (size - 1) // 2
