"""curate: every document is accounted for, and what is kept depends on recipe and inputs alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_tools.choices import BadLinePolicy
from data_tools.corpus import Corpus
from data_tools.curate import curate
from data_tools.curation.recipe import Recipe
from data_tools.errors import InputError, ShardError, StorageError, UsageError
from data_tools.input_files import find_inputs
from tests.data_tools.curation.conftest import Whole
from tests.data_tools.curation.reading import hashes, records
from tests.data_tools.curation.texts import documents, full_recipe, story, write_corpus

CHEAP = [{"step": "unicode"}, {"step": "exact_duplicates"}]


def recipe(**more: object) -> Recipe:
    return Recipe.model_validate({"name": "test", "steps": CHEAP, **more})


@pytest.mark.end_to_end
def test_every_document_gets_what_it_should(whole: Whole) -> None:
    kept = {record["id"]: record for record in records(whole.result.output)}
    kinds = Counter(record["kind"] for record in kept.values())
    # of the pair of near duplicates one stays, whichever
    assert kinds["story"] + kinds["near"] == 30
    assert kinds["mail"] == 1
    assert set(kinds) <= {"story", "near", "mail"}
    mail = next(record for record in kept.values() if record["kind"] == "mail")
    assert mail["text"].endswith("Write to <email> or <phone> today.")
    assert mail["language"] == "en"
    assert mail["origin"].startswith(str(whole.corpus))
    untouched = {document["id"]: document["text"] for document in documents() if document["kind"] == "story"}
    assert all(record["text"] == untouched[name] for name, record in kept.items() if record["kind"] == "story")
    assert "".join(kept) == "".join(document["id"] for document in documents() if document["id"] in kept)


@pytest.mark.end_to_end
def test_counts_reconcile_by_step_and_in_total(whole: Whole) -> None:
    numbers = whole.result.numbers
    assert numbers["documents_in"] == len(documents())
    assert numbers["documents_out"] == len(records(whole.result.output))
    came = numbers["documents_in"]
    for step in numbers["steps"]:
        assert step["documents_in"] == came
        came = step["documents_out"]
        assert step["documents_in"] == step["documents_out"] + sum(step["dropped"].values()), step["name"]
    assert came == numbers["documents_out"]
    everything = sum(count for reasons in numbers["dropped"].values() for count in reasons.values())
    assert everything == numbers["documents_in"] - numbers["documents_out"] == 8
    assert numbers["dropped"] == {
        "language": {"another language": 1},
        "gopher_repetition": {"dup_line_frac": 1},
        "gopher_quality": {"gopher_short_doc": 1},
        "exact_duplicates": {"the same text came before": 3},
        "near_duplicates": {"much like another document": 1},
        "decontamination": {"contaminated: evaluation.jsonl": 1},
    }
    assert numbers["bytes_out"] == sum(len(record["text"].encode()) for record in records(whole.result.output))
    assert sum(numbers["lengths"]["before"]) == numbers["documents_in"]
    assert sum(numbers["lengths"]["after"]) == numbers["documents_out"]


@pytest.mark.end_to_end
def test_samples_are_the_dropped_documents(whole: Whole) -> None:
    steps = {step["name"]: step for step in whole.result.numbers["steps"]}
    copies = steps["exact_duplicates"]["samples"]["the same text came before"]
    assert [sample["identifier"].split("-")[0] for sample in copies] == ["copy"] * 3
    assert copies[0]["text"] == story(2)[: len(copies[0]["text"])]
    german = steps["language"]["samples"]["another language"][0]
    assert german["identifier"].startswith("german")
    assert german["detail"].startswith("de ")


@pytest.mark.end_to_end
def test_tasks_and_workers_change_nothing(whole: Whole, tmp_path: Path) -> None:
    cut = full_recipe(whole.evaluation, tasks=4)
    two = curate(cut, [whole.corpus], tmp_path / "two", workers=2)
    assert len(two.numbers["files"]) == 4
    assert records(two.output) == records(whole.result.output)
    assert two.numbers["steps"] == whole.result.numbers["steps"]  # samples too
    one = curate(cut, [whole.corpus], tmp_path / "one", workers=1)
    assert hashes(one.output) == hashes(two.output)


@pytest.mark.end_to_end
def test_what_prepare_reads_from_the_output_is_what_was_kept(whole: Whole) -> None:
    corpus = Corpus(pieces=find_inputs([whole.result.output]), on_bad_line=BadLinePolicy.FAIL)
    read = [(document.identifier, document.text) for _, document in corpus.documents()]
    assert read == [(record["id"], record["text"]) for record in records(whole.result.output)]


@pytest.mark.end_to_end
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_bad_lines_are_counted_shown_and_set_aside(tmp_path: Path, compression: str) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=4)
    lines = source.read_text().splitlines()
    lines[3:3] = ["{broken", json.dumps({"id": "no text"}), json.dumps({"text": " \n\t", "id": "blank"})]
    source.write_text("\n".join(lines) + "\n")
    kept_aside = {"inputs": {"on_bad_line": "quarantine"}, "compression": compression, "tasks": 3}
    done = curate(recipe(**kept_aside), [source], tmp_path / "out")
    assert done.numbers["dropped"]["read"] == {"not JSON": 1, "no text key": 1, "only white space": 1}
    assert done.numbers["documents_in"] == len(lines)
    aside = [json.loads(line) for line in (done.output / "quarantine.log").read_text().splitlines()]
    assert [(record["line"], record["reason"]) for record in aside] == [(4, "not JSON"), (5, "no text key")]
    samples = done.numbers["steps"][0]["samples"]
    assert samples["not JSON"][0]["source"] == f"{source}:4"
    assert all(name.endswith(f".jsonl.{compression}") for name in done.numbers["files"])
    with pytest.raises(InputError, match="not JSON"):
        curate(recipe(), [source], tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


@pytest.mark.end_to_end
def test_a_finished_output_is_reused_another_recipe_and_damage_are_refused(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    first = curate(recipe(), [source], tmp_path / "out")
    assert not first.reused
    again = curate(recipe(workers=3), [source], tmp_path / "out")
    assert again.reused
    assert again.numbers == first.numbers
    with pytest.raises(UsageError, match="another recipe"):
        curate(recipe(steps=[{"step": "unicode"}]), [source], tmp_path / "out")
    file = tmp_path / "out" / next(iter(first.numbers["files"]))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ShardError, match=file.name):
        curate(recipe(), [source], tmp_path / "out")
    file.unlink()
    (tmp_path / "out" / "curation.json").unlink()
    with pytest.raises(UsageError, match="not an empty folder"):
        curate(recipe(), [source], tmp_path / "out")


@pytest.mark.end_to_end
def test_nothing_left_says_which_step_took_it(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    with pytest.raises(InputError, match="most were dropped by language .*another language"):
        curate(recipe(steps=[{"step": "language", "keep": ["ja"]}]), [source], tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "names no inputs and no output"),
        ({"inputs": {"paths": ["absent.jsonl"]}, "output": "out"}, "absent.jsonl does not exist"),
    ],
)
def test_what_is_missing_is_told_before_any_work(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, InputError), match=message):
        curate(recipe(**given))


def test_two_runs_for_one_output_are_refused(tmp_path: Path) -> None:
    from data_tools.curation.workplace import own_work_folder

    source = write_corpus(tmp_path / "in.jsonl", stories=3)
    with own_work_folder(tmp_path / "out", "another"), pytest.raises(StorageError, match="another run"):
        curate(recipe(), [source], tmp_path / "out")
