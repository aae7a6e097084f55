"""The only door to deepspeed: imports it without its autotuner's mlflow, and keeps it quiet."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

logger = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """Import deepspeed about 3 s faster than a bare import and first use would."""
    if "deepspeed" not in sys.modules:
        with _without_mlflow():
            import deepspeed
        with _without_compiling():
            import deepspeed.runtime.zero.muon.original_muon
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls collectives by names that torch 2.13 calls deprecated, at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Let `import mlflow` fail in the block: deepspeed's autotuner tries it, and it loads over 1,800 modules."""
    is_imported = "mlflow" in sys.modules
    if not is_imported:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not is_imported:
            sys.modules.pop("mlflow", None)


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Let `torch.compile` give functions back as they are in the block.

    deepspeed looks at every optimizer's class to see whether it is Muon, whose module compiles functions at import and
    so loads all of inductor. We offer no Muon.
    """
    compile_function = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


@contextmanager
def quiet() -> Iterator[None]:
    """Send what deepspeed prints in the block (memory tables, build notes) to the debug log."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue():
            logger.debug("deepspeed printed:\n%s", printed.getvalue().rstrip())
