"""Encoder-decoders: trained alike by the plain and zero engines, counted, evaluated, exported and used."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from data_tools.token_shards import TokenizerIdentity
from pretrain.__main__ import run_command_line
from pretrain.config import ExecutionSection, LossSection, load_config
from pretrain.config_data import SpanCorruptionSection
from pretrain.data.loader import evaluation_batches
from pretrain.data.open_datasets import open_datasets
from pretrain.errors import ConfigError, DataError
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.infill import _fill
from pretrain.inference.load import load_source, read_tokenizer, with_sentinels
from pretrain.models.build import ModelBuilder
from pretrain.run_plan import load_and_plan
from tests.distributed.ranks import RankPool
from tests.pretrain.continued_runs import LENGTH, STEPS, train_run
from tests.pretrain.data.datasets import write_documents
from tests.pretrain.inference.tiny_data import encode_texts, write_texts
from tests.pretrain.inference.tiny_runs import write_tokenizer

pytestmark = pytest.mark.ranks

MODEL = {
    "model_type": "t5",
    "vocab_size": 336,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,  # fewer than a row has tokens
}
LAYOUTS = {
    "ZeRO 0": ["parallel.engine=zero", "parallel.zero_stage=0"],
    "ZeRO 1": ["parallel.engine=zero"],
    "ZeRO 2": ["parallel.engine=zero", "parallel.zero_stage=2"],
    "ZeRO 3": ["parallel.engine=zero", "parallel.zero_stage=3"],
    "ZeRO 1, recomputation": ["parallel.engine=zero", "execution.recomputation=full"],
    "ZeRO 1, selective recomputation": ["parallel.engine=zero", "execution.recomputation=selective"],
}
VALIDATED = 12  # documents
GAPS = "the ship <extra_id_0> the harbour at <extra_id_1>"
Pool = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rank_pool: Pool) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    identity = TokenizerIdentity(name="tiny", sha256=write_tokenizer(folder / "data" / "tokenizer"))
    documents = encode_texts(folder / "data" / "tokenizer", write_texts(120))
    for split, part in (("train", documents), ("validation", documents[:VALIDATED])):
        write_documents(folder / "data" / split, part, vocabulary_size=300, split=split, tokenizer=identity)
    run: dict[str, Any] = {
        "name": "spans",
        "seed": 1,
        "model": MODEL,
        "data": {
            "train": str(folder / "data"),
            "validation": {"main": str(folder / "data")},
            "span_corruption": {"noise_density": 0.2},
        },
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"name": "constant", "total_steps": STEPS},
        "precision": "fp32",
        "checkpoint": {"every_steps": 3},
        "reporting": {"mlflow": False, "tensorboard": False, "console": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    [losses] = rank_pool(1).run(train_run, str(folder / "run.yaml"), str(folder / "plain"), ["parallel.engine=plain"])
    (folder / "losses.txt").write_text(" ".join(map(repr, losses)))
    return folder


def reference(folder: Path) -> list[float]:
    return [float(word) for word in (folder / "losses.txt").read_text().split()]


@pytest.mark.parametrize(
    "layout",
    [name if name in ("ZeRO 1", "ZeRO 3") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_zero_trains_as_one_process_does(place: Path, rank_pool: Pool, layout: str) -> None:
    found = rank_pool(2).run(train_run, str(place / "run.yaml"), str(place / layout), LAYOUTS[layout])[0]
    assert found == pytest.approx(reference(place), rel=2e-5)
    assert found[-1] < found[0]


def test_a_stopped_run_goes_on_on_other_ranks(place: Path, rank_pool: Pool) -> None:
    words = [str(place / "run.yaml"), str(place / "stopped")]
    rank_pool(2).run(train_run, *words, ["parallel.engine=zero", "schedule.stop_at_step=3"])
    [losses] = rank_pool(1).run(train_run, *words, ["parallel.engine=plain"])
    assert losses == pytest.approx(reference(place), rel=2e-5)


def test_parameters_and_flops_are_those_of_the_model(place: Path) -> None:
    config, plan = load_and_plan(place / "run.yaml", [], 1)
    model = ModelBuilder(
        config.model, seed=1, sequence_length=LENGTH, execution=ExecutionSection(), loss=LossSection()
    ).build("cpu")
    assert plan.parameters.total == sum(weight.numel() for weight in model.parameters())
    assert float(model.network.shared.weight.detach().std()) == pytest.approx(
        1.0, rel=0.05
    )  # as T5 starts, not as others
    opened = open_datasets(config.data, sequence_length=LENGTH, vocabulary_size=336)
    batch = next(evaluation_batches(opened.validation["main"], micro_batch_size=4, rank=0, data_parallel_size=1))
    with FlopCounterMode(display=False) as counted:
        model(batch)
    # the counter takes attention for square, where a causal decoder needs half
    assert plan.flops.forward * 4 * LENGTH == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_the_run_is_evaluated_document_by_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["evaluate", str(place / "plain"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sets"]["main"]
    assert found["loss"] == pytest.approx(reference(place)[-1], rel=1e-6)
    assert found["documents"] == VALIDATED
    assert found["bits_per_byte"] is None  # of a part of the text
    assert run_command_line(["evaluate", str(place / "plain"), "--json", "--batch-size", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"]["main"]["loss_interval"] == found["loss_interval"]


def test_targets_belong_to_the_document_that_they_are_of(place: Path) -> None:
    evaluation = Evaluation.of(load_source(place / "plain"), torch.device("cpu"))
    (found,) = evaluate_datasets(
        evaluation,
        {"main": str(place / "data" / "validation")},
        sequence_length=LENGTH,
        spans=SpanCorruptionSection(noise_density=0.2),
    )
    opened = open_datasets(
        load_config(place / "run.yaml").data, sequence_length=LENGTH, vocabulary_size=336
    ).validation["main"]
    borders = opened.dataset.document_starts(0, opened.rows * LENGTH).tolist()
    expected = [0] * len(borders)
    for number in range(opened.rows):
        row = opened.row(number)
        _, _, places = opened.span_corruption.corrupt(row.tokens[: row.used].astype("int64"), ("validation", number))
        for position in places.tolist():
            expected[bisect.bisect_right(borders, number * LENGTH + position) - 1] += 1
    assert found.targets.tolist() == expected
    assert len(set(expected)) > 3


def test_the_exported_folder_is_the_model_and_fills_gaps(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["export", str(place / "plain"), "-o", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert "logits equal to the checkpoint's" in capsys.readouterr().out
    loaded, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ours = load_source(place / "plain").network
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), ours.parameters(), strict=True))
    assert "text2text-generation" in (tmp_path / "out" / "README.md").read_text()
    assert tokenizer.convert_tokens_to_ids("<extra_id_1>") == 301
    for source in (place / "plain", tmp_path / "out"):
        assert run_command_line(["infill", str(source), "-t", GAPS, "--max-new-tokens", "12"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("the ship")
    assert "extra_id" not in first
    ids = tokenizer(GAPS + tokenizer.eos_token, return_tensors="pt", add_special_tokens=False).input_ids
    around = tokenizer.convert_ids_to_tokens(ids[0])
    assert "Ġ" not in around  # a space goes with the word after it, which here is the span's, as in training
    assert "".join(around).replace("Ġ", " ") == GAPS.replace(" <", "<") + tokenizer.eos_token
    written = tokenizer.decode(loaded.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, 1:])
    assert first == fill(GAPS, written, tokenizer.eos_token)


def fill(text: str, written: str, end: str) -> str:
    """By the model card's words: what follows a sentinel stands in its place, with the space before it."""
    parts = re.split(r"(<extra_id_\d+>)", written.split(end, maxsplit=1)[0])
    pieces = dict(zip(parts[1::2], parts[2::2], strict=True))
    return re.sub(r"\s*(<extra_id_\d+>)", lambda found: pieces.get(found[1], ""), text)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<extra_id_0> left<extra_id_1> noon.", "the ship left the harbour at noon."),
        ("<extra_id_1> noon<extra_id_0>s of<eos> the ships", "the ships of the harbour at noon"),
        ("lost <extra_id_0> in", "the ship in the harbour at"),
        ("<extra_id_0> a<extra_id_0> b<extra_id_7> c", "the ship a b the harbour at"),
    ],
)
def test_spans_stand_in_their_gaps_whatever_the_order(tmp_path: Path, written: str, expected: str) -> None:
    write_tokenizer(tmp_path)
    tokenizer = with_sentinels(read_tokenizer(tmp_path), 300, 8)
    ids, spans = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (GAPS, written.replace("<eos>", tokenizer.eos_token))
    )
    assert _fill(tokenizer, ids, spans) == expected


def test_what_is_made_for_decoders_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(place / "plain"), str(tmp_path / "out")
    assert run_command_line(["export", run, "-o", str(tmp_path / "exported")]) == 0
    for words, reason in (
        (["generate", run, "--prompt", "the"], "use `pretrain infill`"),
        (["serve", run, "--port", "0"], "use `pretrain infill`"),
        (["quantize", run, "-o", out], "encoder-decoder"),
        (["import", str(tmp_path / "exported"), "-o", out], "encoder-decoder"),
        (["infill", run, "-t", "no gap"], "write one in the place of each gap"),
        (["infill", run, "-t", "<extra_id_1> <extra_id_0>"], "in this order"),
        (["infill", run, "-t", "".join(f"<extra_id_{number}>" for number in range(9))], "no token of the model"),
    ):
        capsys.readouterr()
        assert run_command_line(words) != 0, words
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wishes_that_cannot_be_met_are_refused(place: Path) -> None:
    path = place / "run.yaml"
    with pytest.raises(ConfigError, match=r"no data\.span_corruption"):
        load_and_plan(path, ["data.span_corruption=null"], 1)
    with pytest.raises(ConfigError, match="a model without an encoder"):
        load_and_plan(path, ["model=null", "model.preset=llama-125m"], 1)
    for change, reason in (
        ("parallel.pipeline=2", "an encoder-decoder with pipeline parallelism"),
        ("evaluation.tasks=[corpus_text]", "evaluation.tasks of an encoder-decoder"),
        ("precision=fp16", "an encoder-decoder with precision fp16"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_and_plan(path, [change], 2)
    with pytest.raises(ConfigError, match="an encoder-decoder with tensor parallelism"):
        load_and_plan(path, ["parallel.tensor=2"], 2)
    config = load_config(path)
    with pytest.raises(DataError, match="sentinels up to id 301"):
        open_datasets(config.data, sequence_length=LENGTH, vocabulary_size=301)
