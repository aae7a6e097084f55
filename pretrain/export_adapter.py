"""Writes a run's adapters as a peft folder, for peft, transformers and servers that load adapters beside their base.

The merged model is export.py's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from pretrain.adapters import RECORD, adapter_settings
from pretrain.checkpoint.durable import sync_folder
from pretrain.checkpoint.fragments import MASTER
from pretrain.checkpoint.inspection import open_verified, select_checkpoint
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.models.lora import ADAPTER, import_peft

WEIGHTS_FILE = "adapter_model.safetensors"


def export_adapter(source: Path, output: Path) -> str:
    """Write adapter_config.json and the adapters, fp32, in one step; returns a line that says so.

    Raises:
        ConfigError: the output exists, or the source has no adapters.
        CheckpointError: the source is damaged, or the output cannot be written.
    """
    output = output.absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(Problem(f"{output} exists", "a new or an empty folder", "choose another --output"))
    staging = output.with_name(f".staging-{output.name}")
    with open_verified(select_checkpoint(source)) as checkpoint:
        known = checkpoint.manifest.metadata.get(RECORD)
        if known is None:
            raise ConfigError(
                Problem(f"{source} has no adapters", "a run with model.lora", "export it without --adapter")
            )
        settings = import_peft().LoraConfig(
            **adapter_settings(checkpoint), base_model_name_or_path=Path(known["base"]["folder"]).name
        )
        # as peft names them: below its own model, and without the adapter's name
        tensors = {
            "base_model.model." + name.replace(f".{ADAPTER}.", "."): checkpoint.read(name, MASTER)
            for name in checkpoint.names()
        }
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        settings.save_pretrained(staging)
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        staging.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(Problem(f"export to {output}: {error}", "room on the disk", "free space")) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{output}: {len(tensors)} tensors of adapters beside {known['base']['folder']}"
