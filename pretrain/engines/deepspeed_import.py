"""The only door to deepspeed: imports it without its autotuner's mlflow, and keeps it quiet."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

logger = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """Import deepspeed in about 1 s less than a bare import.

    deepspeed's autotuner tries `import mlflow` (over 1,800 modules) at import time; a None in sys.modules makes that
    one import fail, as if mlflow were absent, and is taken back at once.
    """
    if "deepspeed" not in sys.modules and "mlflow" not in sys.modules:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
        try:
            import deepspeed
        finally:
            sys.modules.pop("mlflow", None)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls collectives by names that torch 2.13 calls deprecated, at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


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
