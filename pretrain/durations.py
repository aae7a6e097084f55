"""Spans of time as people and Slurm write them, in seconds.

Pure text; what is done when one has passed is training/time_limit.py's and the launcher's.
"""

from __future__ import annotations

import re

from pretrain.errors import ConfigError, Problem

UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_SPANS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")
_SLURM_TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def parse_duration(text: str) -> int | None:
    """Seconds of `23h50m`, `2d`, `90s`, `23:50:00`, `1-00:00:00`; None for any other text, and for no time at all.

    Two numbers around a colon are none of them: Slurm means minutes and seconds, people hours and minutes.
    """
    return _seconds(_CLOCK.fullmatch(text.strip()) or _SPANS.fullmatch(text.strip())) or None


def require_duration(place: str, text: str) -> int:
    """The same of what somebody wrote at a place.

    Raises:
        ConfigError: for any other text.
    """
    if (seconds := parse_duration(text)) is None:
        raise ConfigError(duration_problem(place, text))
    return seconds


def duration_problem(place: str, text: str) -> Problem:
    """What is wrong with a text that is no duration."""
    return Problem(f"{place} is {text!r}", "such as 23h50m, 90s, 23:50:00 or 1-00:00:00", "write it so")


def parse_slurm_time_left(text: str) -> int | None:
    """Seconds of squeue's `[days-][hours:]minutes:seconds`; None for UNLIMITED and the like."""
    return _seconds(_SLURM_TIME_LEFT.fullmatch(text.strip()))


def _seconds(found: re.Match[str] | None) -> int | None:
    if found is None:
        return None
    return sum(int(part or 0) * unit for part, unit in zip(found.groups(), UNIT_SECONDS.values(), strict=True))
