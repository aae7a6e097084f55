"""Weights, phases and limits as they are written: what they come to, and what is refused with what advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import load_config
from pretrain.config_data import DataSection
from pretrain.data.ledger import (
    ledger,
    ledger_values,
    order_record,
    reading_warnings,
    require_enough,
    require_same_past,
)
from pretrain.data.mixture_plan import initial_weights, mixture_problems
from pretrain.data.open_datasets import open_datasets
from pretrain.data.reading_plan import plan_reading
from pretrain.data.training_rows import TrainingRows
from pretrain.errors import ConfigError, DataError
from tests.pretrain.data.datasets import numbered_rows

WIDTH = 4
ROWS = {"a": 40, "b": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sources")
    for name, count in {**ROWS, "new": 30}.items():
        numbered_rows(base / name, count, WIDTH)
    return base


def section(folder: Path, *sources: dict[str, Any], **mixture: Any) -> DataSection:
    named = [{**source, "path": f"{folder}/{source['path']}"} for source in sources]
    return DataSection.model_validate({"train": named, "mixture": mixture})


def rows_of(data: DataSection, seed: int = 3) -> TrainingRows:
    opened = open_datasets(data, sequence_length=WIDTH, vocabulary_size=60_000)
    return TrainingRows(opened.training, seed=seed, phases=opened.phases)


A, B = {"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}


def test_a_temperature_makes_weights_of_sizes() -> None:
    bare = [{"path": "a"}, {"path": "b"}]
    assert initial_weights(section(Path(), *bare, temperature=1), [400, 100]) == [1, 0.25]
    assert initial_weights(section(Path(), *bare, temperature=2), [400, 100]) == [1, 0.5]
    assert initial_weights(section(Path(), *bare), [400, 100]) == [1, 1]


def test_a_phase_begins_with_the_first_row_at_or_after_its_tokens(folder: Path) -> None:
    rows = rows_of(section(folder, A, B, phases=[{"from_tokens": 41, "weights": {"a": 0, "b": 1}}]))
    sources = [place.source for place in rows.locate(np.arange(14))]
    assert 0 in sources[8:11]
    assert sources[11:] == [1, 1, 1]


def test_phases_within_one_row_are_one(folder: Path) -> None:
    phases = [{"from_tokens": tokens, "weights": {"a": tokens == 1, "b": tokens == 2}} for tokens in (1, 2)]
    for phase in phases:
        phase["weights"] = {name: float(weight) for name, weight in phase["weights"].items()}  # type: ignore[union-attr]
    sources = [place.source for place in rows_of(section(folder, A, B, phases=phases)).locate(np.arange(5))]
    assert sources == [0, 1, 1, 1, 1]


def test_every_fault_of_a_mixture_is_told(folder: Path) -> None:
    phases: list[dict[str, Any]] = [
        {"from_tokens": 100, "weights": {"a": 1, "bb": 1}},
        {"from_tokens": 100, "weights": {"a": 0, "b": 0}},
    ]
    data = section(folder, A, B, {"path": "new", "name": "b"}, temperature=2, phases=phases)
    found = [str(problem) for problem in mixture_problems(data)]
    for words in (
        "2 training sources are called 'b'",
        "temperature is given, and weights for a, b",
        "did you mean b?",
        "phases[0].weights lacks b",
        "phases[1].from_tokens is 100, the phase before begins at 100",
        "phases[1]: every weight is 0",
    ):
        assert any(words in text for text in found), words
    zero = section(folder, {**A, "weight": 0}, {**B, "weight": 0})
    assert "every training source has weight 0" in str(mixture_problems(zero)[0])
    with pytest.raises(DataError, match="every training source has weight 0"):
        rows_of(zero)


def test_the_resolved_mixture_reads_back(tmp_path: Path, folder: Path) -> None:
    from pretrain.config import save_config

    recipe = Path(__file__).parents[3] / "launch/recipes/quickstart.yaml"
    train = f"data.train=[{{path: {folder}/a, max_epochs: 2.5}}, {{path: {folder}/b}}]"
    mixture = "data.mixture={temperature: 2, phases: [{from_tokens: 2_000, weights: {a: 0.5, b: 1}}]}"
    config = load_config(recipe, [train, mixture])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert not mixture_problems(config.data)


def test_a_used_up_source_leaves_its_share_and_all_used_up_is_refused(folder: Path) -> None:
    rows = rows_of(section(folder, {**A, "max_epochs": 1}, {**B, "max_epochs": 2.55}))
    assert rows.mixture.available(1000) == 40 + 25
    places = rows.locate(np.arange(65))
    assert len(set(places)) == 65
    assert {place.source for place in places[-5:]} == {1} or {place.source for place in places[-5:]} == {0}
    require_enough(rows, 65)
    with pytest.raises(DataError, match=r"asks for 264 tokens.*used up after 260"):
        require_enough(rows, 66)
    with pytest.raises(DataError, match="used up after 260"):
        plan_reading(
            section(folder, {**A, "max_epochs": 1}, {**B, "max_epochs": 2.55}),
            sequence_length=WIDTH,
            vocabulary_size=60_000,
            seed=3,
            total_samples=66,
        )


def test_the_plan_counts_and_warns_of_repetition(folder: Path) -> None:
    plan = plan_reading(section(folder, A, B), sequence_length=WIDTH, vocabulary_size=60_000, seed=3, total_samples=200)
    assert (plan.given["a"].rows, plan.given["b"].tokens, plan.given["b"].epochs) == (140, 240, 6.0)
    assert plan.rows == ROWS
    assert [warning.split(" times")[0] for warning in plan.warnings] == ["b will be read 6.0"]
    assert reading_warnings(rows_of(section(folder, A, B)), 100) == []


def test_the_ledger_is_a_recount(folder: Path) -> None:
    rows = rows_of(
        section(folder, {**A, "max_epochs": 1}, B, phases=[{"from_tokens": 99, "weights": {"a": 2, "b": 1}}])
    )
    for count in (0, 1, 24, 25, 26, 100, 333):
        sources = [place.source for place in rows.locate(np.arange(count))]
        found = ledger(rows, count)
        assert [given.rows for given in found.values()] == [sources.count(0), sources.count(1)]
        assert ledger_values(rows, count)["data/b/epochs"] == sources.count(1) / 10
        assert ledger_values(rows, count)["data/b/tokens"] == sources.count(1) * WIDTH


def same_past(then: TrainingRows, now: TrainingRows, samples: int) -> str:
    """Empty where the order is taken for the same, which is looked at as well; else what is said."""
    try:
        require_same_past(now, order_record(then, samples), samples)
    except ConfigError as refusal:
        return str(refusal)
    assert now.locate(np.arange(samples)) == then.locate(np.arange(samples))
    return ""


def test_a_resumed_run_reads_on_in_the_order_it_began(folder: Path, tmp_path: Path) -> None:
    then = rows_of(section(folder, A, B))
    new = {"path": "new", "weight": 0}
    later = {"from_tokens": 400, "weights": {"a": 0.2, "b": 0.8}}
    with_new = {"from_tokens": 400, "weights": {"a": 0.2, "b": 0.7, "new": 0.1}}
    assert same_past(then, rows_of(section(folder, A, B)), 100) == ""
    assert same_past(then, rows_of(section(folder, {**A, "weight": 7}, {**B, "weight": 3})), 100) == ""
    assert same_past(then, rows_of(section(folder, A, B, phases=[later])), 100) == ""
    assert "from_tokens: 404" in same_past(then, rows_of(section(folder, A, B, phases=[later])), 101)
    assert same_past(then, rows_of(section(folder, A, B, new, phases=[with_new])), 100) == ""
    assert same_past(then, rows_of(section(folder, A, {**B, "max_epochs": 3.1})), 100) == ""
    assert "max_epochs differ" in same_past(then, rows_of(section(folder, A, {**B, "max_epochs": 2})), 100)
    assert "seed is 4" in same_past(then, rows_of(section(folder, A, B), seed=4), 100)
    assert "data.train[1] (b) was read by this run and is gone" in same_past(then, rows_of(section(folder, A)), 100)
    assert "data.train[1] (new) has 30 rows, and had 10" in same_past(
        then, rows_of(section(folder, A, {**new, "weight": 0.3})), 100
    )
