"""Reading, overriding, saving and refusing run configurations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import RunConfig, load_config, save_config
from pretrain.errors import ConfigError, Problem
from pretrain.yaml_text import read_yaml, write_yaml

GOOD: dict[str, Any] = {
    "name": "tiny",
    "model": {"model_type": "llama", "hidden_size": 64},
    "data": {"train": "data/train"},
    "batch": {"sequence_length": 128, "micro_batch_size": 2, "global_batch_size": 8},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"total_steps": 10},
}


def write(folder: Path, changes: dict[str, Any] | None = None, *, without: str = "") -> Path:
    values = copy.deepcopy(GOOD)
    for place, value in (changes or {}).items():
        section, _, key = place.partition(".")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    if without:
        section, _, key = without.partition(".")
        del values[section][key]
    path = folder / "run.yaml"
    path.write_text(write_yaml(values), encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return list(caught.value.problems)


def test_the_resolved_copy_reloads_equal(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, {"name": "1e3", "model.rope_parameters": {"rope_theta": 1e6}}), ["optimizer.epsilon=1e-12"]
    )
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.name == "1e3"
    assert config.model.fields["rope_parameters"] == {"rope_theta": 1e6}


def test_the_resolved_copy_names_every_key(tmp_path: Path) -> None:
    save_config(load_config(write(tmp_path)), tmp_path / "resolved.yaml")
    saved = yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))
    assert set(saved) == set(RunConfig.model_fields)
    assert saved["loss"] == {"z_loss": 0.0, "chunk_tokens": 1024}


def test_overrides_reach_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path), ["parallel.zero_stage=3", "seed=7", "model.hidden_size=96", "optimizer.betas=[0.8, 0.9]"]
    )
    assert (config.parallel.zero_stage, config.seed, config.optimizer.betas) == (3, 7, (0.8, 0.9))
    assert config.model.fields == {"hidden_size": 96}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3"])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path), [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-3


def test_whole_numbers_serve_as_numbers_but_not_the_other_way(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["optimizer.weight_decay=0", "schedule.total_steps=1_000"])
    assert (config.optimizer.weight_decay, config.schedule.total_steps) == (0.0, 1000)
    (problem,) = problems(write(tmp_path), "schedule.total_steps=10.5")
    assert problem.allowed == "a whole number"


def test_text_is_never_turned_into_a_number(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, {"optimizer.learning_rate": "1e-3"}))  # quoted in the file
    assert problem.allowed == "a number"
    (problem,) = problems(write(tmp_path, {"name": 1000.0}))
    assert problem.allowed.startswith("text")
    assert load_config(write(tmp_path), ["name=2024"]).name == "2024"  # the shell has no quotes left
    assert load_config(write(tmp_path), ["name=1e3"]).name == "1e3"


@pytest.mark.parametrize(
    ("place", "value", "found", "change"),
    [
        ("batch.micro_batch_sise", 4, "unknown key batch.micro_batch_sise", "did you mean batch.micro_batch_size?"),
        ("optimiser", {}, "unknown key optimiser", "did you mean optimizer?"),
        ("learning_rate", 1.0, "unknown key learning_rate", "did you mean optimizer.learning_rate?"),
        ("zzz", 1.0, "unknown key zzz", "remove zzz"),
        ("precision", "bf61", "precision is 'bf61'", "did you mean bf16?"),
        ("parallel.zero_stage", True, "parallel.zero_stage is 'true'", "change parallel.zero_stage"),
        ("execution.compile", "yes", "execution.compile is 'yes'", "change execution.compile"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate is inf", "change optimizer.learning_rate"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas[1] is 1.0", "change optimizer.betas[1]"),
        ("seed", -1, "seed is -1", "change seed"),
        ("name", "a/b", "name is 'a/b'", "change name"),
        ("name", "..", "name is '..'", "change name"),
        ("data.train", [], "data.train is []", "change data.train"),
        ("data.train", 3, "data.train is 3", "change data.train"),
        ("data.train", [{"paht": "A"}], "unknown key data.train[0].paht", "did you mean data.train[0].path?"),
        ("batch", "big", "batch is 'big'", "change batch"),
    ],
)
def test_one_mistake_is_one_problem_in_our_words(
    tmp_path: Path, place: str, value: Any, found: str, change: str
) -> None:
    (problem,) = problems(write(tmp_path, {place: value}))
    assert (problem.found, problem.change) == (found, change)
    assert problem.allowed


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, without="optimizer.learning_rate"))
    assert problem.found == "optimizer.learning_rate is not given"


def test_a_misspelt_key_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, {"optimizer.learning_rat": 1.0}, without="optimizer.learning_rate"))
    assert problem.change == "did you mean optimizer.learning_rate?"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model.preset": "gpt2-125m"}, "model.model_type and model.preset are both given"),
        ({"model": {"hidden_size": 3}}, "the model section names no model"),
        ({"schedule.total_tokens": 5}, "schedule.total_steps and schedule.total_tokens are both given"),
        ({"schedule": {"name": "cosine"}}, "the schedule has no length"),
        (
            {"schedule.warmup_steps": 5, "schedule.warmup_tokens": 5},
            "schedule.warmup_steps and schedule.warmup_tokens are both given",
        ),
        ({"execution": {"recompute_every": 2}}, "execution.recompute_every is 2, but nothing is recomputed"),
    ],
)
def test_keys_that_exclude_one_another(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    (problem,) = problems(write(tmp_path, changes))
    assert problem.found == found


def test_five_mistakes_are_five_problems(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "optimizer.learning_rate": "fast",
            "optimizer.weigth_decay": 0.1,
            "schedule.total_tokens": 5,  # with a wrong key in the same section
            "schedule.warmup_steps": -1,
            "precision": "fp8",
        },
    )
    found = problems(path)
    assert len(found) == 5
    assert all(problem.found and problem.allowed and problem.change for problem in found)


def test_problems_of_file_and_overrides_come_together(tmp_path: Path) -> None:
    found = problems(write(tmp_path, {"precision": "fp8"}), "seed", "batch.sequence_lenght=1", "name.first=1")
    assert len(found) == 4


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "a: [\n", "seed: 1\nseed: 2\n", "\x00"], ids=["empty", "list", "open", "twice", "binary"]
)
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems(path)
    assert str(path) in problem.found


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    for name in ("latin.yaml", "absent.yaml"):
        assert len(problems(tmp_path / name)) == 1


def test_an_empty_section_is_a_section_without_keys(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "checkpoint:\n", encoding="utf-8")
    assert load_config(path).checkpoint.keep_last == 3


def test_nothing_changes_after_reading(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.batch.sequence_length = 3


@pytest.mark.parametrize(
    "value", ["1e3", "on", "1:30", "2024-01-01", "010", "null", "true", "0x1f", "~", "", "<<", "é"]
)
def test_text_survives_writing_and_reading(value: str) -> None:
    assert read_yaml(write_yaml({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "on"), ("1:30", "1:30"), ("010", 10), ("0x1F", 31), ("0o17", 15), ("1_000", 1000), ("-.5e3", -500.0)]
    + [("~", None), ("True", True), ("no", "no"), ("2024-01-01", "2024-01-01"), ("-.inf", float("-inf"))],
)
def test_plain_words_follow_yaml_1_2(text: str, value: Any) -> None:
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_a_file_lays_its_values_over_those_it_extends(tmp_path: Path) -> None:
    base = load_config(write(tmp_path))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "large.yaml").write_text("extends: ../run.yaml\nname: large\nbatch: {micro_batch_size: 4}\n")
    (tmp_path / "last.yaml").write_text("extends: inner/large.yaml\nseed: 7\n")
    batch = base.batch.model_copy(update={"micro_batch_size": 4})
    last = load_config(tmp_path / "last.yaml")
    assert last == base.model_copy(update={"name": "large", "seed": 7, "batch": batch})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("extends: a.yaml", "extends itself"), ("extends: [b.yaml]", "the path of one"), ("extends: no.yaml", "no.yaml")],
)
def test_a_chain_of_files_that_cannot_be_followed_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (found,) = problems(tmp_path / "a.yaml")
    assert expected in f"{found.found} {found.allowed}"
