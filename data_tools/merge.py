"""Merges datasets into one: their shards under new numbers in one folder, by hard links, with one manifest a split.

Reads manifests and sizes only; tokens are neither read nor written where links can be made.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from data_tools.errors import ShardError, UsageError
from data_tools.manifest import MANIFEST_NAME, Manifest, ShardRecord, load_manifest, save_manifest
from data_tools.publish import Made, is_finished, staged_output
from data_tools.shard_verify import split_folders
from data_tools.token_shards import open_dataset

DROPPED_EXAMPLES = 20  # kept of all datasets together

logger = logging.getLogger(__name__)


def merge(datasets: Sequence[Path], output: Path) -> Made:
    """Make a dataset of all shards of several, split by split, in the order given; it appears when it is complete.

    Across file systems, where no hard link can be made, files are copied; the reason is logged.

    Raises:
        ShardError: a dataset is missing or not of the recorded sizes, or two do not fit together.
        UsageError: a dataset is given twice, or the output holds something else.
        StorageError: another run is writing the output.
    """
    found = [
        (dataset, folder, open_dataset(folder).manifest) for dataset in datasets for folder in split_folders(dataset)
    ]
    if len({folder.resolve() for _, folder, _ in found}) < len(found):
        raise UsageError(
            "the same dataset is given twice", "each dataset once", "repeat data by its weight in training"
        )
    request = {
        "merged": [[m.split, xxh3_128_hexdigest((folder / MANIFEST_NAME).read_bytes())] for _, folder, m in found]
    }
    if is_finished(output, request):
        return Made(manifests={path.name: load_manifest(path) for path in split_folders(output)}, reused=True)
    _refuse_differences([(folder, manifest) for _, folder, manifest in found])
    dropped: Counter[str] = Counter()
    examples: list[str] = []
    for dataset in datasets:  # every split repeats what its whole corpus dropped
        manifest = next(manifest for origin, _, manifest in found if origin == dataset)
        dropped.update(manifest.dropped)
        examples += manifest.dropped_examples
    manifests = {}
    with staged_output(output) as staging:
        for split in dict.fromkeys(manifest.split for _, _, manifest in found):
            parts = [(folder, manifest) for _, folder, manifest in found if manifest.split == split]
            (staging / split).mkdir()
            merged = replace(
                _merge_manifests([manifest for _, manifest in parts]),
                shards=tuple(_link_shards(parts, staging / split)),
                dropped=dict(dropped),
                dropped_examples=tuple(examples[:DROPPED_EXAMPLES]),
                command=f"data-tools merge {' '.join(str(dataset) for dataset in datasets)}",
                request=request,
            )
            save_manifest(merged, staging / split)
            manifests[split] = merged
        _copy_tokenizer([folder for _, folder, _ in found], staging)
    return Made(manifests=manifests)


def _refuse_differences(parts: Sequence[tuple[Path, Manifest]]) -> None:
    first_folder, first = parts[0]
    for folder, manifest in parts[1:]:
        ours, theirs = _what_must_agree(first), _what_must_agree(manifest)
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            facts = "; ".join(f"{name}: {theirs[name]}, not {ours[name]}" for name in different)
            raise ShardError(
                f"{folder} does not fit {first_folder} ({facts})",
                "datasets of one tokenizer, one dtype and one way of packing",
                "prepare or pack them alike, or name them as separate sources of training",
            )


def _what_must_agree(manifest: Manifest) -> dict[str, object]:
    packing = manifest.packing
    return {
        "tokenizer sha256": manifest.tokenizer.sha256[:16],
        "vocabulary": manifest.vocabulary_size,
        "EOS": (manifest.eos_id, manifest.eos_policy),
        "dtype": manifest.dtype,
        "packing": None if packing is None else (packing.method, packing.sequence_length),
    }


def _merge_manifests(manifests: Sequence[Manifest]) -> Manifest:
    first = manifests[0]
    if len(manifests) == 1:
        return first
    packings = [manifest.packing for manifest in manifests if manifest.packing is not None]
    packing = None
    if packings:
        packing = replace(
            packings[0],
            padding_tokens=sum(part.padding_tokens for part in packings),
            cut_documents=sum(part.cut_documents for part in packings),
            loose_ends=sum(part.loose_ends for part in packings),
        )
    # the entropy of a union does not follow from those of its parts
    return replace(first, packing=packing, unigram_entropy_nats=None)


def _link_shards(parts: Iterable[tuple[Path, Manifest]], target: Path) -> Iterable[ShardRecord]:
    number = 0
    for folder, manifest in parts:
        for shard in manifest.shards:
            name = f"shard-{number:05d}"
            for suffix in shard.files:
                _link(folder / f"{shard.name}.{suffix}", target / f"{name}.{suffix}")
            yield replace(shard, name=name)
            number += 1


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # a link to a symbolic link would lead out of the folder
    try:
        target.hardlink_to(source)
    except OSError as error:
        if not source.exists():
            raise
        logger.warning("%s is copied, for no hard link can be made: %s", source, error.strerror)
        with source.open("rb") as reading, target.open("wb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 24)
            writing.flush()
            os.fsync(writing.fileno())


def _copy_tokenizer(folders: Iterable[Path], target: Path) -> None:
    places = (place / "tokenizer" for folder in folders for place in (folder, folder.parent))
    tokenizer = next((place for place in places if place.is_dir()), None)
    if tokenizer is not None:
        shutil.copytree(tokenizer, target / "tokenizer")
