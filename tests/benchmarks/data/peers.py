"""The programs that encode a corpus: ours, the bare loops that bound them, and the peers that can be had here.

Each is a command for a process of its own; that of the bare loops is `python -m tests.benchmarks.data.peers NAME ...`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import orjson

_BATCH_BYTES = 1 << 21
_STREAMED_BYTES = 1 << 24  # at a time, to both cores: the loop by which gigatoken's speed was set


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command line with places for corpus and output, or the reason why it cannot be run here."""

    name: str
    command: tuple[str, ...] = ()  # {corpus}, {output}
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    def words(self, corpus: Path, output: Path) -> list[str]:
        """Return the command for one run."""
        return [word.format(corpus=corpus, output=output) for word in self.command]


def programs(tokenizer: Path, workers: int, megatron: Path | None) -> list[Program]:
    """Return all of them, ours first."""
    python = sys.executable
    ours = (python, "-m", "data_tools", "prepare", "{corpus}", "--tokenizer", str(tokenizer), "--output", "{output}")
    bare = (python, "-m", "tests.benchmarks.data.peers")
    found = []
    for backend in ("tokenizers", "gigatoken"):
        missing = "" if importlib.util.find_spec(backend) else f"{backend} is not installed"
        command = (*ours, "--workers", str(workers), "--backend", backend)
        found.append(Program(name=f"prepare, {backend}", command=command, missing=missing))
        alone = (*bare, backend, str(tokenizer), "{corpus}", "{output}")
        found.append(Program(name=f"bare {backend}", command=alone, missing=missing))
    peer = (*bare, "datatrove", str(tokenizer), "{corpus}", "{output}")
    missing = "" if importlib.util.find_spec("datatrove") else "datatrove is not installed (extra curate)"
    found.append(Program(name="datatrove DocumentTokenizer, 1 task", command=peer, missing=missing))
    found.append(_megatron(tokenizer, workers, megatron))
    return found


def _megatron(tokenizer: Path, workers: int, checkout: Path | None) -> Program:
    name = f"Megatron preprocess_data.py, {workers} workers"
    if checkout is None or not (checkout / "tools" / "preprocess_data.py").is_file():
        return Program(name=name, missing="no checkout of Megatron-LM was given (--megatron)")
    script = str(checkout / "tools" / "preprocess_data.py")
    words = [sys.executable, "-m", "tests.benchmarks.data.peers", "megatron", script, "--input", "{corpus}"]
    words += ["--json-keys", "text", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    words += ["--append-eod", "--workers", str(workers), "--output-prefix", "{output}", "--log-interval", "1000000"]
    return Program(name=name, command=tuple(words), environment={"TORCH_COMPILE_DISABLE": "1"})


def _batches(corpus: Path, size: int) -> Iterator[list[str]]:
    with corpus.open("rb") as file:
        while lines := file.readlines(size):
            yield [orjson.loads(line)["text"] for line in lines]


def _bare_tokenizers(tokenizer: Path, corpus: Path, output: Path) -> None:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with output.open("wb") as file:
        for texts in _batches(corpus, _BATCH_BYTES):
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                file.write(np.array(encoding.ids, np.uint16).data)


def _bare_gigatoken(tokenizer: Path, corpus: Path, output: Path) -> None:
    from gigatoken import Tokenizer

    encoder = Tokenizer.from_json((tokenizer / "tokenizer.json").read_bytes())
    with output.open("wb") as file:
        for texts in _batches(corpus, _STREAMED_BYTES):
            layout = encoder.encode_batch(texts, parallel=True).layout
            offsets = np.asarray(layout.offsets.data)
            file.write(np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(np.uint16).data)


def _datatrove(tokenizer: Path, corpus: Path, output: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    writer = DocumentTokenizer(
        str(output),
        str(tokenizer / "tokenizer.json"),
        eos_token="<|endoftext|>",  # noqa: S106
        shuffle_documents=False,
    )
    LocalPipelineExecutor([reader, writer], tasks=1, logging_dir=str(output / "logs")).run()


def _run_megatron(words: list[str]) -> None:
    """Run a script of Megatron's, which asks for Python 3.12's `typing.override`, and for triton without using it."""
    import runpy
    import typing

    if importlib.util.find_spec("triton") is None:
        for name in ("torch.utils.flop_counter", "torch._inductor.runtime.triton_heuristics", "transformers"):
            importlib.import_module(name)  # these look for triton themselves: before it seems to be there
        sys.meta_path.append(_Stubs())

    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined,unused-ignore]
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parents[1]))
    runpy.run_path(words[0], run_name="__main__")


class _Stubs(MetaPathFinder, Loader):
    """Lets `import triton` and what is below it succeed, with objects that do nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "triton" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from unittest.mock import MagicMock

        stub: ModuleType = MagicMock(name=spec.name, __path__=[], __version__="0.0.0")
        return stub

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def main() -> None:
    """Run the one that is named."""
    name, *words = sys.argv[1:]
    if name == "megatron":
        _run_megatron(words)
        return
    run = {"tokenizers": _bare_tokenizers, "gigatoken": _bare_gigatoken, "datatrove": _datatrove}[name]
    run(*map(Path, words))


if __name__ == "__main__":
    main()
