"""Says whether the quickstart's model learned: its validation loss beside the entropy of single tokens.

Run as `python -m launch.quickstart_result FOLDER`. Reads what training and preparation wrote; computes nothing new.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GAIN_NATS = 1.0  # what a model must know beyond the frequency of tokens


def main(folder: Path) -> int:
    """Print the comparison; exit code 1 where the model learned too little."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [values["validation/main/loss"] for values in map(json.loads, lines) if "validation/main/loss" in values]
    manifest = json.loads((folder / "data/packed/train/manifest.json").read_text(encoding="utf-8"))
    entropy, loss = manifest["unigram_entropy_nats"], losses[-1]
    print(f"validation loss          {loss:.3f} nats per token")
    print(f"unigram entropy          {entropy:.3f} nats per token (a model that knows only token frequencies)")
    print(f"learned beyond that      {entropy - loss:.3f} nats; at least {GAIN_NATS:.1f} wanted")
    return 0 if entropy - loss >= GAIN_NATS else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
