"""Two nodes that ssh reaches, on loopback addresses of this machine: a real sshd with keys and folders of its own.

Changes nothing of the user's ssh; needs root, because sshd does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import jobs

ADDRESSES = ("127.0.0.2", "127.0.0.3")
DEADLINE_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class SshNodes:
    """What a job description needs to know."""

    hosts: tuple[str, ...]
    config: Path


def require_programs() -> None:
    """Skip with the reason where something is missing."""
    missing = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (tests/run.sh --system installs them)")
    if os.getuid() != 0:
        pytest.skip("sshd can only be started by root")


@contextmanager
def ssh_nodes(folder: Path) -> Iterator[SshNodes]:
    """Start the daemon, and stop it and every session at the end."""
    require_programs()
    folder.chmod(0o755)
    port = jobs.free_port()
    for name in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (folder / "authorized_keys").chmod(0o600)
    (folder / "sshd_config").write_text(_server(folder, port), encoding="utf-8")
    config = folder / "ssh_config"
    config.write_text(_client(folder, port), encoding="utf-8")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    sshd = shutil.which("sshd", path=_path())
    daemon = subprocess.Popen(
        [str(sshd), "-D", "-f", folder / "sshd_config", "-E", folder / "log"], start_new_session=True
    )
    try:
        _wait_for(config)
        yield SshNodes(hosts=ADDRESSES, config=config)
    finally:
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.wait(DEADLINE_SECONDS)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def _server(folder: Path, port: str) -> str:
    listened = "".join(f"ListenAddress {address}\n" for address in ADDRESSES)
    return f"""Port {port}
{listened}HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PrintMotd no
PrintLastLog no
"""


def _client(folder: Path, port: str) -> str:
    return f"""Host {" ".join(ADDRESSES)}
  Port {port}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
"""


def _wait_for(config: Path) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    for address in ADDRESSES:
        command = ["ssh", "-F", str(config), address, "true"]
        while subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode:
            assert time.monotonic() < end, "sshd does not answer"
            time.sleep(0.1)
