from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.monitoring.alert_targets import AlertFeed, to_webhook
from pretrain.monitoring.alerts import Alert, find_alerts
from pretrain.monitoring.run_history import RunHistory
from tests.pretrain.monitoring.runs import BEGAN, write_run


def noise(count: int) -> list[float]:
    random.seed(1)
    return [4.0 - step / 500 + random.gauss(0, 0.02) for step in range(count)]


def alerts_of(folder: Path, seconds_later: float = 1.0) -> list[tuple[str, int]]:
    run = RunHistory(folder)
    return [(alert.kind, alert.step) for alert in find_alerts(run, BEGAN + run.step + seconds_later)]


def test_a_healthy_run_alarms_nobody(tmp_path: Path) -> None:
    assert alerts_of(write_run(tmp_path / "run", noise(300))) == []


def test_spikes_and_values_that_are_not_finite_are_named_by_step(tmp_path: Path) -> None:
    losses = noise(300)
    losses[289], losses[294], losses[40] = 6.0, float("nan"), 9.0  # the last is long over
    assert alerts_of(write_run(tmp_path / "run", losses)) == [("not finite", 295), ("spike", 290)]


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    assert alerts_of(write_run(tmp_path / "run", noise(300), skipped={297: 2})) == [("skipped", 297)]


def test_dropping_speed_is_told(tmp_path: Path) -> None:
    slower = {step: 60.0 for step in range(280, 301)}
    assert alerts_of(write_run(tmp_path / "run", noise(300), tokens_per_second=slower)) == [("slow", 300)]


def test_silence_is_told_of_a_run_that_has_not_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", noise(300))
    assert alerts_of(run, seconds_later=100) == []
    assert alerts_of(run, seconds_later=200) == [("silent", 300)]
    done = write_run(tmp_path / "done", noise(300), total=300)
    assert alerts_of(done, seconds_later=10_000) == []
    (run / "goodput.jsonl").write_text(json.dumps({"event": "end", "time": 1.0, "outcome": "stopped"}) + "\n")
    assert alerts_of(run, seconds_later=200) == []


def test_a_disk_without_room_for_two_more_saves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", noise(100))
    monkeypatch.setattr(RunHistory, "last_save_bytes", lambda self: 2**60)
    assert alerts_of(run) == [("disk", 100)]


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, object]]]]:
    received: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_hears_of_each_event_once_and_its_absence_stops_nothing(
    webhook: tuple[str, list[dict[str, object]]], caplog: pytest.LogCaptureFixture
) -> None:
    address, received = webhook
    feed = AlertFeed("tiny", [to_webhook("http://127.0.0.1:9/closed"), to_webhook(address)])
    spike, slow = Alert("spike", 7, "high"), Alert("slow", 9, "half the speed")
    feed.tell([spike, slow])
    feed.tell([spike, Alert("slow", 10, "half the speed")])  # the same state, one step on
    assert [message["kind"] for message in received] == ["spike", "slow"]
    assert received[0] == {"run": "tiny", "kind": "spike", "step": 7, "text": "tiny: step 7: spike: high"}
    feed.tell([])
    feed.tell([Alert("slow", 50, "again")])  # it was over in between
    assert received[-1]["step"] == 50
    assert "an alert could not be sent" in caplog.text


def test_a_webhook_must_be_an_address() -> None:
    with pytest.raises(ConfigError, match="allowed"):
        to_webhook("file:///etc/passwd")
