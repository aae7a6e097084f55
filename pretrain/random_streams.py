"""Seeds as pure functions of (seed, purpose, index): no generator state to keep, save or restore.

An index never contains a rank, so that a stream does not depend on the layout. Sample order has its own, in data/.
"""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed that differs for every purpose and index."""
    text = "/".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
