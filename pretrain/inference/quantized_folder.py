"""Folders with a quantized model: safetensors and JSON only, read back to the bit.

Owns the files. 8 bits are stored as transformers stores torchao's tensors, so that it loads the folder as well; 4 bits
are packed two to a byte, which only this package reads, in a file that transformers does not look for: where it finds
weights of other names it fills the model with random ones, and only warns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from pretrain.errors import CheckpointError, Problem
from pretrain.inference.quantize import Quantization, require_torchao

QUANTIZATION_FILE = "quantization.json"
WEIGHTS_FILES: Mapping[int, str] = {8: "model.safetensors", 4: "packed_int4.safetensors"}  # by bits
FORMAT_VERSION = 1
PACKED = "packed"  # key of the safetensors metadata: names of tensors with two values a byte


def is_quantized_folder(folder: Path) -> bool:
    """True where `write_quantized` has written."""
    return (folder / QUANTIZATION_FILE).is_file()


def write_quantized(network: PreTrainedModel, how: Quantization, folder: Path) -> None:
    """Write weights and configuration of a quantized model into an existing folder."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tied = _tied(network)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items() if name not in tied}
    tensors, metadata = flatten_tensor_state_dict(state)
    packed = {name: list(tensors[name].shape) for name in tensors if how.bits == 4 and name.endswith("_qdata")}
    for name in packed:
        tensors[name] = pack(tensors[name])
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILES[how.bits],
        metadata={**metadata, PACKED: json.dumps(packed), "format": "pt"},
    )
    _write_json(folder / "config.json", network.config.to_dict() | _for_transformers(how))
    _write_json(folder / QUANTIZATION_FILE, {"version": FORMAT_VERSION, "library": "torchao", **asdict(how)})


@torch.no_grad()
def load_quantized(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Build the network and give it the stored weights; `dtype` is what it computes with.

    Raises:
        CheckpointError: a file is damaged or of another version, or weights are missing.
    """
    require_torchao()
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    path = folder / WEIGHTS_FILES[_stored_bits(folder)]
    tensors, metadata = _read_weights(path)
    try:
        for name, shape in json.loads(metadata.pop(PACKED)).items():
            tensors[name] = unpack(tensors[name], shape)
        state, rest = unflatten_tensor_state_dict(tensors, metadata)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise _damaged(path, f"does not fit its own description ({error})") from error
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.tie_weights()
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items() if name not in _tied(network)}
    wrong = [
        name for name in wanted.keys() | state.keys() if name not in state or wanted.get(name) != state[name].shape
    ]
    if wrong or rest:
        raise _damaged(path, f"lacks or has other weights than the model: {', '.join(sorted(wrong)[:3])}")
    network.load_state_dict(state, strict=False, assign=True)
    network.tie_weights()
    loaded: PreTrainedModel = network.to(device=device, dtype=dtype).eval()
    return loaded


def pack(values: torch.Tensor) -> torch.Tensor:
    """4-bit values (int8 from -8 to 7), two a byte, the first in the low half; flat, an odd one is filled up."""
    halves = values.flatten().view(torch.uint8) & 0xF
    halves = torch.nn.functional.pad(halves, (0, halves.numel() % 2))
    return halves[::2] | (halves[1::2] << 4)


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `pack` has packed, int8 of its own shape."""
    halves = torch.stack((packed & 0xF, packed >> 4), -1).flatten()[: math.prod(shape)].view(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).view(*shape)


def _tied(network: PreTrainedModel) -> set[str]:
    """Names of tensors that are another one as well, which the file has once."""
    names: dict[int, str] = {}
    tied = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if names.setdefault(id(tensor), name) != name:
            tied.add(name)
    return tied


def _for_transformers(how: Quantization) -> dict[str, Any]:
    if how.bits == 4:
        return {}
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()).to_dict()}


def _stored_bits(folder: Path) -> int:
    path = folder / QUANTIZATION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, bits = values["version"], values.get("bits")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if version != FORMAT_VERSION or bits not in WEIGHTS_FILES:
        raise _damaged(path, f"has version {version} and {bits} bits, this program reads version {FORMAT_VERSION}")
    return int(bits)


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        Problem(f"{path} {how}", "a folder as pretrain quantize wrote it", "quantize the model again")
    )


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
