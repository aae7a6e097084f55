"""What a tracker is told of a run at every start besides its numbers: tags and texts. Says nothing of how.

Collected on the reporting thread, for git and the list of packages take a while.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

MOST_DIFF_CHARACTERS = 1_000_000
GIT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Names and texts; equal names of a later start replace the earlier ones."""

    tags: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)  # file name, folders by slashes -> content


CollectFacts = Callable[[], RunFacts]


def git_facts(folder: Path) -> RunFacts:
    """Commit, branch and local changes of the code in a folder; nothing where it is in no repository."""
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        return RunFacts()
    difference = _git(folder, "diff", "HEAD")
    tags = {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip(),
        "athanor.git.changed": str(bool(difference.strip())).lower(),
    }
    return RunFacts(tags=tags, texts={"git/changes.diff": difference[:MOST_DIFF_CHARACTERS]} if difference else {})


def environment_facts() -> RunFacts:
    """The machine of this process, and every installed package."""
    packages = sorted({f"{each.metadata['Name']}=={each.version}" for each in distributions()}, key=str.lower)
    lines = (
        f"python: {platform.python_version()}",
        f"platform: {platform.platform()}",
        f"host: {platform.node()}",
        f"processor: {platform.processor() or platform.machine()}",
    )
    texts = {
        "environment/machine.yaml": "\n".join(lines) + "\n",
        "environment/packages.txt": "\n".join(packages) + "\n",
    }
    return RunFacts(texts=texts)


def joined(*facts: RunFacts) -> RunFacts:
    """All of them, the last one first where names are equal."""
    tags: dict[str, str] = {}
    texts: dict[str, str] = {}
    for each in facts:
        tags.update(each.tags)
        texts.update(each.texts)
    return RunFacts(tags=tags, texts=texts)


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
