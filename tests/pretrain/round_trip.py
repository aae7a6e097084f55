"""Random models of every family, saved by transformers, imported and exported again: what of them changed.

test_import.py runs them, and writes ROUND_TRIP.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.export import export_source
from pretrain.import_folder import import_folder
from pretrain.inference.load import load_source
from tests.pretrain.inference.tiny_runs import write_tokenizer
from tests.pretrain.models.small_models import small_fields

REPORT = Path(__file__).with_name("ROUND_TRIP.md")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "olmo2", "mixtral", "qwen3_moe")
SHARDS = {"one file": "1GB", "shards": "40KB"}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = 320


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    family: str
    files: str
    stored: str
    tensors: int
    is_bit_equal: bool
    logit_difference: float  # largest, of the exported model, the imported one and the original, in fp32

    def __str__(self) -> str:
        equal = "yes" if self.is_bit_equal else "NO"
        return (
            f"| {self.family} | {self.files} | {self.stored} | {self.tensors} | {equal} | {self.logit_difference:.1e} |"
        )


def save_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> None:
    """As transformers saves it, with a tokenizer beside it."""
    torch.manual_seed(3)
    fields = small_fields(family, vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.1)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields))
    with torch.no_grad():
        for vector in (parameter for parameter in network.parameters() if parameter.ndim == 1):
            vector.add_(0.1 * torch.randn(vector.shape))  # norms and biases start as ones and zeros, all alike
    network.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)


def round_trip(family: str, files: str, stored: str, folder: Path) -> Row:
    """Save, import, export, and compare."""
    save_model(family, folder / "original", dtype=TYPES[stored], max_shard_size=SHARDS[files])
    import_folder(folder / "original", folder / "imported")
    export_source(folder / "imported", folder / "exported", shard_bytes=40_000 if files == "shards" else 10**9)
    before, after = read_tensors(folder / "original"), read_tensors(folder / "exported")
    logits = [logits_of(AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)) for name in _ENDS]
    logits.append(logits_of(load_source(folder / "imported").network))
    return Row(
        family=family,
        files=files,
        stored=stored,
        tensors=len(before),
        is_bit_equal=before.keys() == after.keys() and all(_is_same(before[name], after[name]) for name in before),
        logit_difference=max(float((found - logits[0]).abs().max()) for found in logits),
    )


_ENDS = ("original", "exported")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by the names in its files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors


@torch.no_grad()
def logits_of(network: PreTrainedModel) -> torch.Tensor:
    """Of two seeded rows."""
    ids = torch.randint(VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))
    logits: torch.Tensor = network.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def cases() -> list[tuple[str, str, str]]:
    """Family, files, stored type."""
    rows = [
        (family, files, stored) for family in FAMILIES for files, stored in zip(SHARDS, ("fp32", "bf16"), strict=True)
    ]
    return [*rows, ("llama", "shards", "fp16")]


def report(rows: list[Row]) -> str:
    """The text of ROUND_TRIP.md."""
    head = (
        "# Import and export, family by family\n\n"
        "Written by `test_import.py`, which fails where it was another before: a random model that\n"
        "transformers saved is imported and exported again. Bit-equal: names, types, shapes and bytes are the same.\n"
        "Logits: largest difference from transformers' model of the original folder, of the exported one and of the\n"
        "imported checkpoint.\n\n"
        "| family | files | type | tensors | bit-equal | largest logit difference |\n|---|---|---|---:|---|---:|\n"
    )
    return head + "".join(f"{row}\n" for row in rows)
