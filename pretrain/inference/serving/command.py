"""`pretrain serve`: from options to a running server.

Owns the order: whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from pretrain.errors import ConfigError, Problem
from pretrain.inference.serving.address import open_socket, require_safe
from pretrain.inference.serving.limits import Limits

INTERRUPTED = 130  # a second Ctrl-C did not wait for what ran


def serve_until_told(source: Path, *, host: str, port: int, name: str | None, token: str | None, limits: Limits) -> int:
    """Load the model and serve it until a signal; returns the exit code."""
    _require_extra()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("pretrain").setLevel(logging.INFO)
    require_safe(host, token)
    with open_socket(host, port) as listening:
        from pretrain.inference.generate import load_for_generation
        from pretrain.inference.serving.app import ModelServer
        from pretrain.inference.serving.server import build_process

        model = load_for_generation(source)
        name = name or source.resolve().name
        server = ModelServer(model, name=name, limits=limits, token=token)
        process = build_process(server, listening, name=name, limits=limits)
        process.run(sockets=[listening])
    return INTERRUPTED if process.force_exit else 0


def _require_extra() -> None:
    missing = [name for name in ("prometheus_client", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            Problem(
                f"{', '.join(missing)}: not installed", "the extra `serve`", "pip install 'athanor-pretrain[serve]'"
            )
        )
