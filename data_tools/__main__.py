"""The command line of the data tools: one function a command, exit codes, and errors in three parts.

The work is done by the modules, imported inside the commands: `--help` must not wait for numpy.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.choices import (
    LONGEST_DOCUMENT_BYTES,
    SAMPLE_BYTES,
    Backend,
    BadLinePolicy,
    Digits,
    PackMethod,
    Split,
    TokenFormat,
    TokenizerType,
    Whitespace,
)
from data_tools.command_options import (
    FRACTIONS,
    BadLine,
    Dataset,
    EosToken,
    Fractions,
    IdKey,
    Inputs,
    Library,
    MaxDocumentBytes,
    Metadata,
    Output,
    Processes,
    ShuffleSeed,
    SplitSeed,
    StdinSuffix,
    TextKey,
    TokenizerFile,
)
from data_tools.errors import DataToolsError, ShardError, UsageError
from data_tools.job_commands import register
from data_tools.look_commands import register_looks

if TYPE_CHECKING:
    from data_tools.manifest import Manifest
    from data_tools.publish import Made

STORAGE_EXIT_CODE = 74

app = typer.Typer(
    help="From corpora to packed, verified token shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Workers = Annotated[int | None, typer.Option(min=1, help="Threads that encode; default: one a core.")]


@app.command()
def train_tokenizer(
    inputs: Inputs,
    output: Output,
    kind: Annotated[TokenizerType, typer.Option("--type", help="Kind of tokenizer.")] = TokenizerType.BPE,
    vocab_size: Annotated[int, typer.Option(help="Tokens at most, special ones included.")] = 32000,
    digits: Annotated[Digits, typer.Option(help="How numbers are cut.")] = Digits.AS_IS,
    whitespace: Annotated[Whitespace, typer.Option(help="Whether runs of spaces are tokens.")] = Whitespace.AS_IS,
    special_token: Annotated[list[str] | None, typer.Option(help="A further special token; may be repeated.")] = None,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Text at most, drawn evenly of all inputs.")] = SAMPLE_BYTES,
    sample_documents: Annotated[int | None, typer.Option(min=1, help="Documents at most, drawn likewise.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    reference: Annotated[Path | None, typer.Option(help="A tokenizer to compare bytes per token with.")] = None,
    text_key: TextKey = "text",
    on_bad_line: BadLine = BadLinePolicy.FAIL,
    max_document_bytes: MaxDocumentBytes = LONGEST_DOCUMENT_BYTES,
    stdin_suffix: StdinSuffix = ".jsonl",
    workers: Workers = None,
) -> None:
    """Train a tokenizer and save a folder that AutoTokenizer loads; tell how many bytes a token stands for."""
    _use_threads(workers)
    from data_tools.standard_input import with_standard_input
    from data_tools.tokenizer_design import TokenizerDesign
    from data_tools.tokenizer_report import describe_training
    from data_tools.tokenizer_training import TrainingRequest, make_tokenizer

    design = TokenizerDesign(
        kind=kind,
        vocabulary_size=vocab_size,
        digits=digits,
        whitespace=whitespace,
        special_tokens=tuple(special_token or ()),
    )
    request = TrainingRequest(
        design=design,
        text_key=text_key,
        on_bad_line=on_bad_line,
        sample_bytes=sample_bytes,
        sample_documents=sample_documents,
        seed=seed,
        max_document_bytes=max_document_bytes,
    )
    with with_standard_input(inputs, sys.stdin.buffer, output, stdin_suffix) as files:
        trained = make_tokenizer(files, request, output, reference)
    _say_if_reused(output, trained.reused)
    typer.echo(describe_training(trained.record))
    made = trained.tokenizer
    typer.echo(f"{output}: {kind.value}, {made.vocabulary_size:,} tokens, EOS {made.eos_token} is {made.eos_id}")


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: TokenizerFile,
    output: Output,
    text_key: TextKey = "text",
    id_key: IdKey = "id",
    split: Fractions = FRACTIONS,
    seed: SplitSeed = 0,
    workers: Processes = None,
    backend: Library = Backend.AUTO,
    on_bad_line: BadLine = BadLinePolicy.FAIL,
    eos_token: EosToken = None,
    metadata: Metadata = "",
    max_document_bytes: MaxDocumentBytes = LONGEST_DOCUMENT_BYTES,
    stdin_suffix: StdinSuffix = ".jsonl",
    shuffle_seed: ShuffleSeed = None,
    hang_seconds: Annotated[float, typer.Option(min=1, help="A worker that does nothing for so long fails.")] = 300,
) -> None:
    """Encode text into token shards, split into train, validation and test; run again, it goes on where it stopped."""
    _use_threads(workers)
    from data_tools.worker_host import loading_host

    began = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    with loading_host(tokenizer, eos_token, backend, workers) as host:  # it loads while this process imports
        from data_tools.prepare import PrepareOptions, parse_fractions
        from data_tools.prepare import prepare as prepare_dataset
        from data_tools.progress import EncodingProgress
        from data_tools.standard_input import with_standard_input

        options = PrepareOptions(
            text_key=text_key,
            id_key=id_key,
            fractions=parse_fractions(split),
            seed=seed,
            on_bad_line=on_bad_line,
            eos_token=eos_token,
            shuffle_seed=shuffle_seed,
            metadata_keys=tuple(key for key in metadata.split(",") if key),
            max_document_bytes=max_document_bytes,
        )
        with with_standard_input(inputs, sys.stdin.buffer, output, stdin_suffix) as files, EncodingProgress() as shown:
            made = prepare_dataset(
                files,
                tokenizer,
                output,
                options,
                workers=workers,
                backend=backend,
                hang_seconds=hang_seconds,
                progress=shown,
                host=host,
            )
    _say_what_was_prepared(made, output, time.monotonic() - began)


@app.command()
def pack(
    dataset: Dataset,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a row.")],
    output: Output,
    method: Annotated[PackMethod, typer.Option(help="How documents are laid into rows.")] = PackMethod.CONCAT,
) -> None:
    """Lay documents into rows of one length, with their boundaries beside them."""
    from data_tools.pack import pack as pack_dataset

    packed = pack_dataset(dataset, output, sequence_length=sequence_length, method=method)
    _say_if_reused(output, packed.reused)
    _say_what_was_made(packed.manifests)


@app.command()
def merge(
    datasets: Annotated[list[Path], typer.Argument(help="Dataset folders, or splits, of one tokenizer and packing.")],
    output: Output,
) -> None:
    """Make one dataset of several without copying their tokens: shards are hard links."""
    from data_tools.merge import merge as merge_datasets

    merged = merge_datasets(datasets, output)
    _say_if_reused(output, merged.reused)
    _say_what_was_made(merged.manifests)


@app.command("import")
def import_token_files(
    inputs: Annotated[list[Path], typer.Argument(help="Token files: .bin (or .idx), .bin, .ds, .npy.")],
    layout: Annotated[TokenFormat, typer.Option("--from", help="Whose files they are.")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that made them: its folder or tokenizer.json.")],
    output: Output,
    split: Annotated[Split, typer.Option(help="The split that they become; merge joins splits.")] = Split.TRAIN,
    split_at_eos: Annotated[bool, typer.Option(help="Documents end at EOS, in files without boundaries.")] = False,
    eos_token: Annotated[str | None, typer.Option(help="End of document; default: the tokenizer's own.")] = None,
) -> None:
    """Make a dataset from token files of Megatron, nanoGPT, datatrove or NumPy."""
    from data_tools.interchange import import_tokens

    imported = import_tokens(
        inputs, layout, tokenizer, output, split=split, split_at_eos=split_at_eos, eos_token=eos_token
    )
    _say_if_reused(output, imported.reused)
    _say_what_was_made(imported.manifests)


@app.command("export")
def export_token_files(
    dataset: Dataset,
    layout: Annotated[TokenFormat, typer.Option("--to", help="Who shall read the files.")],
    output: Output,
) -> None:
    """Write a dataset of documents as token files of Megatron, nanoGPT, datatrove or NumPy."""
    from data_tools.interchange import export_tokens

    for path in export_tokens(dataset, layout, output):
        typer.echo(f"{path}: {path.stat().st_size:,} bytes")


@app.command()
def verify(
    dataset: Dataset,
    hashes: Annotated[bool, typer.Option(help="Read and hash every file, or only look at sizes.")] = True,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild the faulty shards from their sources.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Shards read at a time; default: one a core.")] = None,
) -> None:
    """Check every shard against its manifest; exit code 65 and the names of the faulty ones if there are any."""
    from data_tools.shard_verify import verify_dataset

    if repair:
        from data_tools.repair import repair_dataset

        for path in repair_dataset(dataset, workers=workers or len(os.sched_getaffinity(0))):
            typer.echo(f"{path}: rebuilt")
        typer.echo(f"{dataset}: whole")
        return
    faults = verify_dataset(dataset, hashes=hashes, workers=workers)
    if faults:
        raise ShardError(
            "\n".join(str(fault) for fault in faults),
            "files that are what the manifest says",
            "rebuild the shards with --repair, restore these files from a copy, or make the dataset again",
        )
    typer.echo(f"{dataset}: whole")


@app.command()
def upload(
    dataset: Dataset,
    url: Annotated[str, typer.Argument(help="Where it shall be: s3://, gs://, hf:// or file://.")],
    read_back: Annotated[bool, typer.Option(help="Compare what the storage gives back, or only sizes.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Files sent at a time.")] = 8,
) -> None:
    """Copy a dataset to a URL, manifests last; run again, it goes on where it stopped."""
    from data_tools.transfer_progress import TransferProgress
    from data_tools.upload import upload_dataset

    with TransferProgress("uploading") as progress:
        done = upload_dataset(dataset, url, read_back=read_back, workers=workers, on_progress=progress.advance)
    typer.echo(f"{url}: {done.sent_bytes:,} bytes sent, {done.present_bytes:,} were there")


@app.command()
def stage(
    url: Annotated[str, typer.Argument(help="A dataset, or a split: s3://, gs://, hf://, http(s):// or file://.")],
    cache: Annotated[Path, typer.Option(help="Folder on a local disk that keeps staged datasets.")],
    split: Annotated[list[Split] | None, typer.Option(help="Stage only this split; may be given again.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Limit of the cache, such as 500GB; others go first.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files fetched at a time.")] = 8,
) -> None:
    """Bring a dataset into a local cache, verified, and print its folder; run again, it fetches what is missing."""
    from data_tools.dataset_cache import parse_size
    from data_tools.stage import stage_dataset
    from data_tools.transfer_progress import TransferProgress

    with TransferProgress("staging") as progress:
        staged = stage_dataset(
            url,
            cache,
            splits=None if split is None else [one.value for one in split],
            max_bytes=None if max_size is None else parse_size(max_size),
            workers=workers,
            on_progress=progress.advance,
        )
    typer.echo(f"fetched {staged.fetched_bytes:,} bytes" if staged.fetched_bytes else "nothing to fetch", err=True)
    typer.echo(staged.folder)


def main() -> int:
    """Run the command line and return the exit code."""
    atexit.register(gc.freeze)  # or the interpreter's last collection looks through all that was imported
    try:
        return app(standalone_mode=False) or 0
    except DataToolsError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        typer.echo(f"error: {_storage_message(error)}", err=True)
        return STORAGE_EXIT_CODE
    except typer.Abort:
        typer.echo("stopped: nothing was published", err=True)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # the command line parser's own complaints have it
            raise
        typer.echo(f"error: {error.format_message()}\n    (see data-tools --help)", err=True)
        return UsageError.exit_code


def _use_threads(workers: int | None) -> None:
    """Set how many threads encode; it must be known before the libraries start them."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here multiplies matrices: numpy's would only wait
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # also for one: a single thread of its own takes less than none
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)


def _say_if_reused(output: Path, reused: bool) -> None:
    if reused:
        typer.echo(f"{output} is complete and was made from this very request: nothing to do")


def _say_what_was_made(manifests: Mapping[str, Manifest]) -> None:
    for name, manifest in manifests.items():
        rows = ""
        if manifest.packing is not None:
            packing = manifest.packing
            rows = (
                f", {manifest.tokens // packing.sequence_length:,} rows, "
                f"{packing.padding_tokens:,} of padding ({packing.padding_tokens / manifest.tokens:.4%}), "
                f"{packing.cut_documents:,} documents cut"
            )
        typer.echo(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens{rows}")
    first = next(iter(manifests.values()))
    for reason, count in first.dropped.items():
        typer.echo(f"dropped {count:,} records: {reason}")
    if first.unigram_entropy_nats is not None:
        typer.echo(f"unigram entropy of the training split: {first.unigram_entropy_nats:.4f} nats per token")


def _say_what_was_prepared(prepared: Made, output: Path, seconds: float) -> None:
    from data_tools.preparation_report import show_report

    _say_if_reused(output, prepared.reused)
    _say_what_was_made(prepared.manifests)
    if not prepared.reused:
        show_report(output, seconds)


def _storage_message(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"{error.strerror or error}{where}\n    allowed: files and folders that can be read and written, with room\n"
        "    change:  free space, mend the permissions, or choose another --output; earlier outputs are whole"
    )


register(app, _use_threads)
register_looks(app)

if __name__ == "__main__":
    sys.exit(main())
