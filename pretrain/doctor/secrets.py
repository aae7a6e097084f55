"""Which environment variables hold secrets, and text without them.

Knows names and shapes only: nothing here sends or stores a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REDACTED = "[redacted]"
SHORTEST_SECRET = 6  # characters; replacing shorter values would eat ordinary text

_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|(?:^|_)KEY$|(?:^|_)(?:AUTH|PAT)$",
    re.IGNORECASE,
)
# What the tokens of common services and addresses with a password look like, whatever the variable is called.
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|ghp_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})"
    r"|://[^/\s:@]*:[^/\s@]+@"
)


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable holds a secret, by its name or by the shape of its value."""
    return bool(_NAME.search(name) or _VALUE.search(value))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The secrets of an environment, longest first, so that none is cut by a shorter one within it."""
    found = {value for name, value in environment.items() if is_secret(name, value)}
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def shown(name: str, value: str) -> str:
    """The value, or a mark in the place of a secret."""
    return REDACTED if is_secret(name, value) else value


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with a mark in the place of every given secret, and of whatever looks like one."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return _VALUE.sub(REDACTED, text)
