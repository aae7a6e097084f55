"""Memory of micro-batches that is used again: to be given fresh pages costs the processor more than to fill them.

What is written there is micro_batch.py's.
"""

from __future__ import annotations

import sys
from threading import Lock

import numpy as np
import numpy.typing as npt

_MOST_BLOCKS = 64  # that are remembered; whoever holds more batches than these has the others freed as usual
_OWN_REFERENCES = 3  # of the list, of the loop and of the call that counts


class BatchBuffers:
    """Blocks of one shape; one is free again when no array or tensor that was made of it is left.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.int64]] = []
        self._lock = Lock()

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Return a block with any content; make views of it, and keep these only."""
        with self._lock:
            if self._blocks and self._blocks[0].shape != shape:
                self._blocks.clear()
            for block in self._blocks:
                if sys.getrefcount(block) == _OWN_REFERENCES:
                    return block[:]  # a view: the block counts it as long as it lives
            block = np.empty(shape, np.int64)
            if len(self._blocks) < _MOST_BLOCKS:
                self._blocks.append(block)
            return block[:]
