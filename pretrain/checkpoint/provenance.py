"""Where a checkpoint came from: versions of the packages that compute, and the state of the source tree."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("athanor-pretrain", "torch", "transformers", "deepspeed", "accelerate", "safetensors", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of Python and the packages that a run's numbers depend on; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted paths of the repository that holds a folder; None where there is none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": _git(folder, "status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
