"""INT8 and INT4: what is smaller, what it costs, and that folders give back to the bit what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pretrain.__main__ import run_command_line
from pretrain.errors import CheckpointError, ConfigError
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.generate import continue_prompts
from pretrain.inference.load import load_source
from pretrain.inference.quantize import Bits, Quantization, quantize_network
from pretrain.inference.quantize_report import quantize_source
from pretrain.inference.quantized_folder import QUANTIZATION_FILE, WEIGHTS_FILES, pack, unpack
from pretrain.inference.sampling import Sampling
from tests.pretrain.checkpoint.states import flip_byte
from tests.pretrain.inference.tiny_data import write_dataset, write_texts
from tests.pretrain.inference.tiny_runs import build_network, write_run

pytest.importorskip("torchao")
CPU = torch.device("cpu")
IDS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "qwen3"])  # the second ties its head
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, data, and the run quantized to 8 and to 4 bits by the command line."""
    folder = tmp_path_factory.mktemp(family)
    write_run(folder / "run", build_network(family))
    data = write_dataset(folder, write_texts())
    for bits in ("8", "4"):
        words = ["quantize", str(folder / "run"), "--bits", bits, "--output", str(folder / bits), "--data", str(data)]
        assert run_command_line(words) == 0
    return folder


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_folders_give_back_the_bits_of_the_quantized_model(folder: Path, family: str, bits: Bits) -> None:
    network = build_network(family)
    expected = network(input_ids=IDS).logits
    quantize_network(network, Quantization(bits=bits))
    quantized = network(input_ids=IDS).logits
    loaded = load_source(folder / str(bits))
    assert torch.equal(loaded.network(input_ids=IDS).logits, quantized)
    error = (quantized - expected).abs().max() / expected.abs().max()
    assert 0 < error < (0.05 if bits == 8 else 0.5)
    table, head = loaded.network.get_input_embeddings().weight, loaded.network.get_output_embeddings().weight
    assert (table is head) == (family == "qwen3")
    assert torch.equal(table, build_network(family).get_input_embeddings().weight)


def test_size_is_what_the_bits_say(folder: Path) -> None:
    linear = sum(
        weight.numel() for name, weight in load_source(folder / "run").network.named_parameters() if "proj" in name
    )
    stored = {bits: load_file(folder / bits / WEIGHTS_FILES[int(bits)]) for bits in ("8", "4")}
    bytes_of = {
        bits: sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if "_qdata" in name)
        for bits, tensors in stored.items()
    }
    assert bytes_of == {"8": linear, "4": linear // 2}


def test_evaluate_and_generate_take_the_folder(folder: Path) -> None:
    losses = {}
    for source in ("run", "8", "4"):
        evaluation = Evaluation.of(load_source(folder / source), CPU)
        (found,) = evaluate_datasets(evaluation, {"main": str(folder / "packed")}, sequence_length=None)
        losses[source] = found.loss.value
        model = load_source(folder / source)
        assert continue_prompts(model, ["the ship"], max_new_tokens=5, sampling=Sampling(temperature=0))
    assert losses["8"] == pytest.approx(losses["run"], rel=5e-3)
    assert losses["4"] == pytest.approx(losses["run"], rel=5e-2)
    assert len(set(losses.values())) == 3


def test_a_lower_precision_can_be_asked_for(folder: Path) -> None:
    for bits in ("8", "4"):
        network = load_source(folder / bits, dtype=torch.bfloat16).network
        assert network(input_ids=IDS[:, :4]).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_transformers_loads_8_bits_and_refuses_4(folder: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder / "8", dtype=torch.float32)
    assert torch.equal(network(input_ids=IDS).logits, load_source(folder / "8").network(input_ids=IDS).logits)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder / "4")


def test_the_report_says_size_speed_and_perplexity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(folder / "run"), "--data", f"a={folder / 'packed'}", "--max-rows", "6"]
    assert run_command_line([*words, "--output", str(folder / "more"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["bytes"] < found["before"]["bytes"]
    assert found["before"]["tokens_per_second"] > 0 < found["after"]["tokens_per_second"]
    assert found["after"]["perplexity"] == pytest.approx(found["before"]["perplexity"], rel=0.05)
    assert run_command_line([*words, "--output", str(folder / "text")]) == 0
    written = capsys.readouterr().out
    assert all(word in written for word in ("INT8", "MB", "tokens/s", "perplexity", "before", "after"))


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (1, 1)])
def test_packing_gives_back_every_value(shape: tuple[int, int]) -> None:
    values = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    packed = pack(values)
    assert packed.numel() == (values.numel() + 1) // 2
    assert torch.equal(unpack(packed, shape), values)
    everything = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(unpack(pack(everything), (16,)), everything)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    data = {"main": str(folder / "packed")}

    def refusal(source: Path, output: Path, how: Quantization, datasets: dict[str, str] = data) -> str:
        with pytest.raises(ConfigError) as caught:
            quantize_source(
                source, output, how, datasets=datasets, sequence_length=None, max_rows=2, cache=None, device=CPU
            )
        assert not list(tmp_path.glob(".staging*"))
        return str(caught.value)

    write_run(tmp_path / "gpt2", build_network("gpt2"))
    out = tmp_path / "out"
    assert "gpt2 has no linear layers of torch's own kind" in refusal(tmp_path / "gpt2", out, Quantization(bits=8))
    assert "does not divide the 64 inputs" in refusal(folder / "run", out, Quantization(bits=4, group_size=48))
    assert "no dataset" in refusal(folder / "run", out, Quantization(bits=8), {})
    assert "is there already" in refusal(folder / "run", folder / "8", Quantization(bits=8))
    assert "has no linear layers" in refusal(folder / "8", out, Quantization(bits=8))  # quantized already
    assert not out.exists()


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        target.mkdir()
        for file in (folder / "4").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    cut = copy()
    content = (cut / WEIGHTS_FILES[4]).read_bytes()
    (cut / WEIGHTS_FILES[4]).write_bytes(content[: len(content) // 2])
    header = copy()
    flip_byte(header / WEIGHTS_FILES[4], 20)
    later = copy()
    (later / QUANTIZATION_FILE).write_text('{"version": 99}')
    config = copy()
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"intermediate_size": 32}))
    for broken in (cut, header, later, config):
        with pytest.raises(CheckpointError):
            load_source(broken)
