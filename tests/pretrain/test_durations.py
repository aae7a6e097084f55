"""Spans of time as people, job descriptions and squeue write them."""

from __future__ import annotations

import pytest

from pretrain.durations import parse_duration, parse_slurm_time_left, require_duration
from pretrain.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("23h50m", 85800), ("2d", 172800), ("90s", 90), ("1d1h1m1s", 90061), (" 5m ", 300)],
        *[("23:50:00", 85800), ("1-00:00:00", 86400), ("1-02:03:04", 93784)],
    ],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


# 23:50 is minutes and seconds to Slurm, and hours and minutes to people
@pytest.mark.parametrize("text", ["", "0s", "00:00:00", "5", "1.5h", "10m2h", "-5m", "soon", "23:50", "1-23:50"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--time-limit is .*23h50m"):
        require_duration("--time-limit", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04\n", 93784), ("2:03:04", 7384), ("03:04", 184), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_what_squeue_says(text: str, seconds: int | None) -> None:
    assert parse_slurm_time_left(text) == seconds
