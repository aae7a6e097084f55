"""The script that shows how a served model is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.inference.generate import continue_prompts
from pretrain.inference.sampling import Sampling
from tests.pretrain.inference.serving.local_server import SECONDS, serve_locally, tiny_model

REPOSITORY = Path(__file__).resolve().parents[4]
TOKEN = "only-for-this-test-0123456789"


@pytest.mark.end_to_end
def test_the_script_prints_what_the_model_writes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    (text,) = continue_prompts(model, ["the ship"], max_new_tokens=24, sampling=Sampling(temperature=0))
    with serve_locally(model, token=TOKEN) as local:
        command = [sys.executable, "launch/ask_model.py", f"http://127.0.0.1:{local.port}/v1", "the ship"]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"OPENAI_API_KEY": TOKEN, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert f"likeliest: the ship{text}\n" in out
    assert f"streamed: the ship{text}\n" in out
    assert "sampled 0: the ship" in out
    assert "sampled 1: the ship" in out
