"""Who may listen where, and with what token; and the command around it, as a process that signals end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.inference.serving.address import open_socket, read_token, require_safe
from tests.pretrain.inference.serving.local_server import SECONDS, tiny_model, wait_until

LONG = "a-token-that-is-long-enough"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_this_machine_alone_needs_no_token(host: str) -> None:
    require_safe(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.com", ""])
def test_others_need_one(host: str) -> None:
    with pytest.raises(ConfigError, match="without a token"):
        require_safe(host, None)
    require_safe(host, LONG)


@pytest.mark.parametrize("token", ["short", "x" * 15, "with\nnewline and more", "ümläüte sind nicht erlaubt"])
def test_tokens_that_cannot_be_sent_or_can_be_guessed_are_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="16 or more printable"):
        require_safe("127.0.0.1", token)


def test_a_token_comes_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(LONG + "\n")
    assert read_token(None, file) == read_token(LONG, None) == LONG
    assert read_token(None, None) is read_token("", None) is None
    with pytest.raises(ConfigError, match="one of them"):
        read_token(LONG, file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token(None, file)
    with pytest.raises(ConfigError, match="a readable file"):
        read_token(None, tmp_path / "none")


def test_an_address_that_is_taken_or_not_ours_is_refused() -> None:
    with open_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(ConfigError, match="in use"):
            open_socket("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ConfigError):
        open_socket("host.invalid", 0)


def test_answers_go_out_as_they_are_written() -> None:
    with open_socket("127.0.0.1", 0) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.end_to_end
def test_the_command_serves_until_a_signal_and_finishes_what_runs(tmp_path: Path) -> None:
    tiny_model(tmp_path / "run", max_position_embeddings=2048)
    log = tmp_path / "log"
    environment = os.environ | {"PRETRAIN_SERVE_TOKEN": LONG}
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "pretrain", "serve", str(tmp_path / "run"), "--port", "0", "--name", "mine"]
            + ["--grace-seconds", str(SECONDS)],
            stderr=file,
            env=environment,
        )
    try:
        wait_until(lambda: "serving mine on" in log.read_text() or server.poll() is not None)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found, log.read_text()
        assert LONG not in log.read_text()
        port = found[0].rsplit(":", 1)[1]
        second = subprocess.run(
            [sys.executable, "-m", "pretrain", "serve", str(tmp_path / "run"), "--port", port],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert (second.returncode, "Address already in use" in second.stderr) == (64, True), second.stderr
        answers: list[dict] = []
        asking = threading.Thread(target=lambda: answers.append(_ask(found[0], tokens=400)), daemon=True)
        asking.start()
        wait_until(lambda: _running(found[0]) == 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS) == 0
        asking.join(SECONDS)
        assert answers[0]["usage"]["completion_tokens"] == 400
        assert "stopping: 1 answers run, 0 wait" in log.read_text()
    finally:
        server.kill()
        server.wait()


def _ask(address: str, *, tokens: int) -> dict:
    body = {"model": "mine", "prompt": "the", "max_tokens": tokens, "temperature": 0}
    return json.loads(_get(f"{address}/v1/completions", json.dumps(body).encode()))


def _running(address: str) -> float:
    lines = _get(f"{address}/metrics").decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("pretrain_running_answers "))


def _get(url: str, body: bytes | None = None) -> bytes:
    headers = {"authorization": f"Bearer {LONG}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=SECONDS) as answer:
        return answer.read()
