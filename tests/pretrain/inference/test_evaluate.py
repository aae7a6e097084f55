"""Loss, bits per byte and intervals of a saved model: against a count by hand, and equal however it is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data_tools.choices import PackMethod
from data_tools.token_shards import open_dataset
from pretrain.__main__ import run_command_line
from pretrain.errors import ConfigError, DataError
from pretrain.export import export_source
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.load import load_source
from pretrain.inference.measures import Measured, estimate_ratio, join
from pretrain.inference.token_bytes import bytes_of_tokens
from pretrain.run_evaluation import EvaluationRequest, evaluate
from tests.distributed.ranks import RankPool
from tests.pretrain.inference.tiny_data import encode_texts, write_dataset, write_texts
from tests.pretrain.inference.tiny_runs import build_network, write_run, write_tokenizer

CPU = torch.device("cpu")
TEXTS = write_texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, its `exported` folder, and the texts as `packed` rows of 24 tokens."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_run(folder / "run", build_network("llama"))
    export_source(folder / "run", folder / "exported", dtype="fp32")
    write_dataset(folder, TEXTS)
    return folder


def measured(source: Path, data: Path, *, rows: int = 8, **options: Any) -> Measured:
    evaluation = Evaluation.of(load_source(source), CPU, rows_at_a_time=rows)
    (found,) = evaluate_datasets(evaluation, {"main": str(data)}, **{"sequence_length": None, **options})
    return found


@torch.no_grad()
def count_by_hand(source: Path, split: Path, sequence_length: int) -> tuple[list[float], list[int]]:
    """Loss and targets of each document, every piece of a row computed alone by the plain network."""
    network, dataset = load_source(source).network, open_dataset(split)
    losses: list[float] = []
    targets: list[int] = []
    goes_on = False
    for number in range(dataset.row_count(sequence_length)):
        row = dataset.row(number, sequence_length)
        ends = [*row.starts[1:].tolist(), row.used]
        for place, (start, end) in enumerate(zip(row.starts.tolist(), ends, strict=True)):
            if not (goes_on and place == 0):
                losses.append(0.0)
                targets.append(0)
            ids = [int(token) for token in row.tokens[start:end]]
            is_cut = row.next_token is not None and end == sequence_length
            labels = [*ids[1:], *([row.next_token] if is_cut else [])]
            wanted = torch.tensor(labels, dtype=torch.long)  # none, of a document that is its end token alone
            logits = network(input_ids=torch.tensor([ids])).logits[0, : len(labels)].double()
            losses[-1] += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            targets[-1] += len(labels)
        goes_on = row.next_token is not None
    return losses, targets


@pytest.mark.parametrize("layout", ["concat", "best-fit", "not packed"])
def test_documents_are_what_each_of_them_gives_alone(folder: Path, tmp_path: Path, layout: str) -> None:
    packs = {"concat": PackMethod.CONCAT, "best-fit": PackMethod.BEST_FIT}
    data = write_dataset(
        tmp_path, TEXTS, sequence_length=24 if layout in packs else None, method=packs.get(layout, PackMethod.CONCAT)
    )
    length = 24 if layout in packs else 48
    found = measured(folder / "run", data, sequence_length=length)
    losses, targets = count_by_hand(folder / "run", data / "validation", length)
    assert found.targets.tolist() == targets
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5, atol=1e-5)
    assert found.loss.value == pytest.approx(sum(losses) / sum(targets), rel=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / sum(targets)), rel=1e-5)
    if layout != "best-fit":  # which counts the rests of cut documents as documents
        assert len(targets) == len(TEXTS)


def test_bytes_are_those_of_the_predicted_text(folder: Path, tmp_path: Path) -> None:
    """Rows as long as the longest document: only its first token is not predicted."""
    data = write_dataset(tmp_path, TEXTS, sequence_length=120, method=PackMethod.BEST_FIT)
    found = measured(folder / "run", data)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    first = [tokenizer.decode(ids[:1]) for ids in encode_texts(tmp_path / "tokenizer", TEXTS)]
    expected = sum(len(text.encode()) for text in TEXTS) - sum(len(text.encode()) for text in first if "�" not in text)
    expected -= sum("�" in text for text in first)  # a byte of a longer character
    assert found.bytes is not None
    assert found.bytes.sum() == expected
    bits = found.bits_per_byte
    assert bits is not None
    assert bits.value == pytest.approx(found.losses.sum() / math.log(2) / expected)


def test_numbers_do_not_depend_on_how_many_rows_are_computed_at_a_time(folder: Path) -> None:
    one = measured(folder / "run", folder / "packed", rows=1)
    for rows in (2, 3, 8, 64):
        other = measured(folder / "run", folder / "packed", rows=rows)
        assert other.targets.tolist() == one.targets.tolist()
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-6, atol=1e-6)
        assert other.loss.low == pytest.approx(one.loss.low, rel=1e-6)


def test_checkpoints_of_any_cut_and_the_exported_folder_give_the_same(folder: Path, tmp_path: Path) -> None:
    # `step` decides how tiny_runs cuts the fragments; tests/pretrain/engines/test_parity.py has real layouts
    write_run(tmp_path / "other", build_network("llama"), step=11)
    results = [
        measured(source, folder / "packed") for source in (folder / "run", tmp_path / "other", folder / "exported")
    ]
    for other in results[1:]:
        assert other.losses.tolist() == results[0].losses.tolist()
        assert other.to_json() == results[0].to_json()


def measure_on_rank(source: str, data: str, rows: int) -> dict[str, Any]:
    return measured(Path(source), Path(data), rows=rows).to_json()


@pytest.mark.ranks
def test_ranks_give_what_one_process_gives(rank_pool: Callable[[int], RankPool], folder: Path) -> None:
    alone = measured(folder / "run", folder / "packed").to_json()
    for rows in (8, 3):
        for found in rank_pool(2).run(measure_on_rank, str(folder / "run"), str(folder / "packed"), rows):
            assert found.pop("unigram_entropy") is None
            assert found.keys() == alone.keys() - {"unigram_entropy"}
            for name, value in found.items():
                assert value == pytest.approx(alone[name], rel=1e-6), name


def test_max_rows_are_the_first(folder: Path) -> None:
    some = measured(folder / "run", folder / "packed", max_rows=5)
    everything = measured(folder / "run", folder / "packed")
    assert some.rows == 5 < everything.rows
    whole = len(some.targets) - 1  # the last one may be cut
    np.testing.assert_allclose(some.losses[:whole], everything.losses[:whole], rtol=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Documents of unlike length whose tokens are alike; each trial draws 60 of them."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        targets = draw.integers(5, 200, 60).astype(float)
        losses = targets * (3 + draw.normal(0, 0.5, 60))
        estimate = estimate_ratio(losses, targets)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 3 <= estimate.high
    assert 0.91 <= hits / 400 <= 0.98


def test_one_document_has_no_interval_and_parts_join() -> None:
    one = Measured(name="a", losses=np.array([6.0]), targets=np.array([2.0]), bytes=None, rows=1)
    assert (one.loss.value, one.loss.low, one.bits_per_byte) == (3.0, None, None)
    both = join([one, Measured(name="b", losses=np.array([2.0]), targets=np.array([2.0]), bytes=None, rows=1)], "all")
    assert both.loss.value == 2.0
    assert both.loss.low is not None
    assert both.loss.low < 2.0


@pytest.mark.parametrize("text", TEXTS[:3] + ["a\tb\n\n  c", "€河🙂", ""])
def test_bytes_of_byte_level_tokens(tmp_path: Path, text: str) -> None:
    write_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    counts = bytes_of_tokens(tokenizer, 320)
    assert counts is not None
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert counts[300:].sum() == counts[tokenizer.convert_tokens_to_ids("<|endoftext|>")] == 0


def test_bytes_of_sentencepiece_tokens_and_of_unknown_kinds() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "▁": 2, "<0xE2>": 3, "ü": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    counts = bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), 5)
    assert counts is not None
    assert counts.tolist() == [0, 4, 1, 1, 2]
    tokenizer.decoder = decoders.WordPiece()
    assert bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 5) is None


def test_the_command_line_names_sets_and_adds_them_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path, write_texts(9, seed=5))
    words = ["evaluate", str(folder / "run"), "--data", f"main={folder / 'packed'}", "--data", f"other={other}"]
    assert run_command_line([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sets = found["sets"]
    assert list(sets) == ["main", "other", "all"]
    assert sets["all"]["targets"] == sets["main"]["targets"] + sets["other"]["targets"]
    assert sets["all"]["documents"] == 49
    low, high = sets["other"]["perplexity_interval"]
    assert low < sets["other"]["perplexity"] < high
    assert "documents" in found["interval"]
    assert run_command_line(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["main", "other", "all"]
    assert "bits/byte" in lines[0]


def test_bad_data_is_refused(folder: Path, tmp_path: Path) -> None:
    def refusal(kind: type[Exception], *data: str, source: str = "run") -> str:
        with pytest.raises(kind) as caught:
            list(evaluate(EvaluationRequest(source=folder / source, data=data), as_json=True))
        return str(caught.value)

    assert "holds no manifest.json" in refusal(DataError, str(tmp_path)) or "has no split" in refusal(
        DataError, str(tmp_path)
    )
    assert "two datasets would be called 'packed'" in refusal(ConfigError, str(folder / "packed"), "x/packed")
    assert "no dataset to evaluate on" in refusal(ConfigError, source="exported")
    data = write_dataset(tmp_path, TEXTS)
    shard = next((data / "validation").glob("*.bin"))
    content = shard.read_bytes()
    shard.unlink()
    assert shard.name in refusal(DataError, str(data))
    shard.write_bytes(content[:-2])
    assert shard.name in refusal(DataError, str(data))
    (data / "validation" / "manifest.json").write_text("[]")
    assert "does not say format" in refusal(DataError, str(data))


def test_rows_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("gpt2"))
    data = write_dataset(tmp_path, TEXTS, sequence_length=200)
    with pytest.raises(DataError, match="rows of 200 tokens, the model 128 learned positions"):
        measured(tmp_path / "run", data)
