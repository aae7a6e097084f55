"""Recipes: what is read, and every problem of one at once, in three parts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from data_tools.curation.recipe import Emoji, GopherQuality, Language, Recipe
from data_tools.curation.recipe_text import RecipeError, read_recipe
from tests.architecture.source_files import REPOSITORY

SHIPPED = sorted((REPOSITORY / "launch/curation").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(folder, text))
    assert caught.value.exit_code == 64
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    return [(fault.found, fault.allowed, fault.change) for fault in caught.value.problems]


def test_plain_words_are_read_as_people_mean_them(tmp_path: Path) -> None:
    text = """
name: nordic
steps:
  - step: language
    keep: [no, da, on]   # YAML 1.1 would read false and true
    least_probability: 5e-1
  - {step: gopher_quality, min_words: null, max_mean_word_length: 12}
  - step: emoji
"""
    recipe = read_recipe(written(tmp_path, text))
    language, quality, emoji = recipe.steps
    assert isinstance(language, Language)
    assert isinstance(quality, GopherQuality)
    assert isinstance(emoji, Emoji)
    assert (language.keep, language.least_probability) == (["no", "da", "on"], 0.5)
    assert (quality.min_words, quality.max_mean_word_length, quality.max_words) == (None, 12, 100_000)
    assert emoji.mode == "name"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = """
name: bad/name
seeds: 3
inputs: {text_keys: body, on_bad_line: skipp}
samples_per_reason: -1
steps:
  - step: gopher_quality
    min_word: 3
    max_words: many
  - step: near_duplicate
  - keep: [en]
  - step: decontamination
  - step: language
    least_probability: 1.5
slurm: {time: "1:00:00", qoss: normal}
"""
    found = problems(tmp_path, text)
    by_place = {fault[0].split(" is ")[0]: fault for fault in found}
    assert by_place["unknown key seeds"][2] == "did you mean seed?"
    assert by_place["unknown key inputs.text_keys"][2] == "did you mean inputs.text_key?"
    assert by_place["inputs.on_bad_line"][1:] == ("fail, skip, quarantine", "did you mean skip?")
    assert by_place["samples_per_reason"][1] == "at least 0"
    assert by_place["unknown key steps[0].min_word"][2] == "did you mean steps[0].min_words?"
    assert by_place["steps[0].max_words"][1] == "a whole number"
    assert by_place["steps[1] names the step 'near_duplicate'"][2] == "did you mean near_duplicates?"
    assert by_place["steps[2] names no step"][2] == "write steps[2] as `- step: NAME`"
    assert by_place["steps[3].texts"][0] == "steps[3].texts is not given"
    assert by_place["steps[4].least_probability"][1] == "at most 1"
    assert by_place["slurm.partition"][0] == "slurm.partition is not given"
    assert by_place["unknown key slurm.qoss"][2] == "did you mean slurm.qos?"
    assert by_place["name"][1].startswith("letters")
    assert len(found) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []\nname: a", "steps is empty"),
        ("name: a", "steps is not given"),
        ("- a\n- b", "holds no mapping of keys"),
        ("name: a\nname: b\nsteps: []", "the key name is given twice"),
        ("name: {", "is not YAML"),
        ("name: a\nsteps: [unicode]", "steps[0]"),
    ],
)
def test_each_kind_of_fault_is_told(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)[0][0]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_read(path: Path) -> None:
    assert read_recipe(path).name == path.stem


def test_there_are_shipped_recipes() -> None:
    assert len(SHIPPED) >= 2


def test_only_what_decides_the_documents_names_the_work(tmp_path: Path) -> None:
    recipe = read_recipe(SHIPPED[0])
    assert recipe.model_copy(update={"workers": 7, "output": "elsewhere"}).decisive() == recipe.decisive()
    assert recipe.model_copy(update={"seed": 9}).decisive() != recipe.decisive()
