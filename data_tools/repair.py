"""Rebuilds the damaged shards of a dataset, and no other, from what the manifest says that they were made of.

A shard is put in place only when all its hashes are the recorded ones. Finding damage is shard_verify.py's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from data_tools.choices import PackMethod, Split, TokenFormat
from data_tools.errors import ShardError, StorageError
from data_tools.interchange import import_tokens
from data_tools.manifest import MANIFEST_NAME, Manifest, ShardRecord, load_manifest, sync_folder
from data_tools.pack import pack
from data_tools.rebuild import rebuild_shards
from data_tools.shard_verify import shard_faults, split_folders, verify_dataset

_WORK = ".repair"

logger = logging.getLogger(__name__)


def repair_dataset(dataset: Path, *, workers: int = 1) -> list[Path]:
    """Rebuild every damaged shard below a folder and return the files that were replaced; [] where all is whole.

    Raises:
        ShardError: a manifest or tokenizer is damaged, inputs are gone or changed, or a rebuilt shard is another one.
        StorageError: another repair is under way.
    """
    replaced: list[Path] = []
    for folder in split_folders(dataset):
        with _alone(folder):
            manifest = load_manifest(folder)
            damaged = {
                shard.name: faults for shard in manifest.shards if (faults := shard_faults(folder, manifest, shard))
            }
            if not damaged:
                continue
            shards = [shard for shard in manifest.shards if shard.name in damaged]
            for faults in damaged.values():
                logger.warning("%s", "\n".join(map(str, faults)))
            work = folder / _WORK
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                made = _rebuild(folder, manifest, shards, work, workers)
                replaced += [path for shard in shards for path in _take_over(folder, shard, made[shard.name])]
            finally:
                shutil.rmtree(work, ignore_errors=True)
            sync_folder(folder)
    left = verify_dataset(dataset)
    if left:
        raise ShardError(
            "\n".join(map(str, left)),
            "a dataset that is whole after its shards were rebuilt",
            "restore these files from a copy, or make the dataset again",
        )
    return replaced


def _rebuild(
    folder: Path, manifest: Manifest, shards: Sequence[ShardRecord], work: Path, workers: int
) -> Mapping[str, Mapping[str, Path]]:
    """Return for each shard its files, made again: suffix -> path."""
    options = manifest.request.get("options", {})
    if "dataset" in manifest.request:
        return _pack_again(folder, manifest, shards, work)
    if "from" in options:
        return _import_again(folder, manifest, shards, work)
    if "text_key" in options:
        names = [shard.name for shard in shards]
        return rebuild_shards(folder, names, work, tokenizer=_tokenizer_of(folder, manifest), workers=workers)
    how = f"it was made by: {manifest.command}" if manifest.command else "how it was made is not recorded"
    raise ShardError(
        f"{folder} cannot be rebuilt shard by shard ({how})",
        "what data-tools prepare, pack or import made",
        "repair the datasets that it was made of, then make it again",
    )


def _pack_again(
    folder: Path, manifest: Manifest, shards: Sequence[ShardRecord], work: Path
) -> dict[str, dict[str, Path]]:
    """Pack the split again; rows are laid for the whole of it, and writing it goes at the speed of the disk."""
    source = Path(shards[0].sources[0].file)
    known = manifest.request["dataset"].values()
    path = source / MANIFEST_NAME
    if not path.is_file() or xxh3_128_hexdigest(path.read_bytes()) not in known:
        raise ShardError(
            f"{source}, which {folder} was packed from, is gone or is another dataset now",
            "the dataset that was packed, where it was",
            f"bring it back, or pack again: {manifest.command.rpartition('| ')[2]}",
        )
    options = manifest.request["options"]
    made = pack(
        source,
        work / "packed",
        sequence_length=options["sequence_length"],
        method=PackMethod(options["method"]),
        shard_tokens=options["shard_tokens"],
    )
    return _same(folder, shards, work / "packed", made.manifests)


def _import_again(
    folder: Path, manifest: Manifest, shards: Sequence[ShardRecord], work: Path
) -> dict[str, dict[str, Path]]:
    options = manifest.request["options"]
    inputs = [Path(fact["file"]) for fact in manifest.request["inputs"]]
    made = import_tokens(
        inputs,
        TokenFormat(options["from"]),
        _tokenizer_of(folder, manifest),
        work / "imported",
        split=Split(options["split"]),
        split_at_eos="--split-at-eos" in manifest.command,
        shard_tokens=options["shard_tokens"],
    )
    return _same(folder, shards, work / "imported", made.manifests)


def _tokenizer_of(folder: Path, manifest: Manifest) -> Path:
    """Return the tokenizer that is kept with a split."""
    for place in (folder / "tokenizer", folder.parent / "tokenizer"):
        if place.is_dir():
            return place
    raise ShardError(
        f"{folder} has no tokenizer beside it",
        f"the tokenizer {manifest.tokenizer.name} of sha256 {manifest.tokenizer.sha256[:12]}",
        f"put it into {folder.parent / 'tokenizer'}",
    )


def _same(
    folder: Path, shards: Sequence[ShardRecord], output: Path, manifests: Mapping[str, Manifest]
) -> dict[str, dict[str, Path]]:
    """Return the files of shards that were made again, after a look at their hashes."""
    ((split, manifest),) = manifests.items()
    found = {shard.name: shard for shard in manifest.shards}
    for shard in shards:
        if shard.name not in found or found[shard.name].files != shard.files:
            raise ShardError(
                f"{folder / shard.name} was made again and has other hashes than the manifest records",
                "the same inputs and options",
                "restore the shard from a copy, or make the dataset again",
            )
    return {
        shard.name: {suffix: output / split / f"{shard.name}.{suffix}" for suffix in shard.files} for shard in shards
    }


def _take_over(folder: Path, shard: ShardRecord, made: Mapping[str, Path]) -> Iterator[Path]:
    """Replace the files of a shard by those that were made again."""
    for suffix in shard.files:
        path = folder / f"{shard.name}.{suffix}"
        made[suffix].replace(path)  # who has the old one open keeps it
        yield path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StorageError(f"{folder} is being repaired", "one repair at a time", "wait for it") from error
    finally:
        os.close(descriptor)
