"""Where a server listens and who may ask: checked and taken before a model is loaded.

Owns the rules for addresses and tokens; imports nothing heavy.
"""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from pretrain.errors import ConfigError, Problem

LEAST_TOKEN_CHARACTERS = 16


def read_token(variable: str | None, file: Path | None) -> str | None:
    """The token of the environment or a file; None where there is neither.

    Raises:
        ConfigError: both, or a file that cannot be read or is empty.
    """
    if file is None:
        return variable or None
    if variable:
        raise ConfigError(Problem("PRETRAIN_SERVE_TOKEN and --token-file", "one of them", "leave one out"))
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(f"{file}: {error}", "a readable file", "change --token-file FILE")) from error
    if not token:
        raise ConfigError(Problem(f"{file} is empty", "a token", "write one into it"))
    return token


def require_safe(host: str, token: str | None) -> None:
    """Refuse an address that others can reach unless they need a token.

    Raises:
        ConfigError: no token, or one that can be guessed.
    """
    problems = []
    if token is None and not _is_loopback(host):
        problems.append(
            Problem(
                f"--host {host} without a token",
                "127.0.0.1 or ::1; another address with a token",
                "set PRETRAIN_SERVE_TOKEN, or give --token-file FILE",
            )
        )
    if token is not None and (len(token) < LEAST_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable()):
        problems.append(
            Problem(
                f"a token of {len(token)} characters",
                f"{LEAST_TOKEN_CHARACTERS} or more printable ASCII characters",
                "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
            )
        )
    if problems:
        raise ConfigError(*problems)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
    """Take the address; nobody can connect yet.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    listening = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # connections inherit it: answers go out as they are written. asyncio sets it on sockets alone whose protocol
        # is named; without it the system holds a second piece back until the first was acknowledged (40 ms)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(
            Problem(f"{host}:{port}: {error.strerror or error}", "a free port of this machine", "change --host, --port")
        ) from error
    return listening
