"""One curation with every step, which several tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra curate is not installed")

from data_tools.curate import Curated, curate
from tests.data_tools.curation.texts import full_recipe, write_corpus, write_evaluation


@dataclass(frozen=True)
class Whole:
    """Its inputs and its result."""

    corpus: Path
    evaluation: Path
    result: Curated


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("curation")
    corpus = write_corpus(folder / "corpus.jsonl")
    evaluation = write_evaluation(folder / "evaluation.jsonl")
    return Whole(corpus, evaluation, curate(full_recipe(evaluation), [corpus], folder / "out"))
