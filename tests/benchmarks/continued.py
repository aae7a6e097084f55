"""What continued pretraining brings: a model of one source of the corpus goes on with the other, with and without LoRA.

    python -m tests.benchmarks.continued [--folder FOLDER] [--steps 300] [--more-steps 120]

Prints each command before it runs, and ends with the losses on held-out text of both sources: ours, and those that
`transformers` alone computes of the exported folders, which must be equal. The exit code is 1 where they are not, or
where the second source was not learnt. What is complete in the folder is kept, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from data_tools.token_shards import open_dataset

CORPUS = Path("launch/corpus/documents.jsonl.gz")
FIRST, SECOND = "postgresql-15", "wordnet-3.0"
RECIPE = ["launch/recipes/quickstart.yaml", "parallel.engine=plain", "reporting.mlflow=false"]
CONTINUATIONS = {  # adapters begin at nothing, and take a higher rate than weights that know something
    "all-weights": ["optimizer.learning_rate=2e-3"],
    "lora-rank-16": ["optimizer.learning_rate=1e-2", "model.lora={rank: 16, alpha: 32}"],
}
LOSSES_DIFFER = 2e-4  # relative: exports are fp32, orders of sums differ


def run(module: str, *words: str | Path) -> str:
    """Say the command, run it, and return what it printed."""
    command = [module, *map(str, words)]
    print("$", shlex.join(["pretrain" if module == "pretrain" else "data-tools", *command[1:]]), flush=True)
    return subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(folder: Path) -> dict[str, Path]:
    """A packed dataset of each source, by one tokenizer of both."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        run("data_tools", "train-tokenizer", CORPUS, "--type", "bpe", "--vocab-size", "4096", "--output", tokenizer)
    packed = {}
    for source in (FIRST, SECOND):
        texts, tokens, packed[source] = folder / f"{source}.jsonl", folder / f"{source}-tokens", folder / source
        if not packed[source].exists():
            with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
                texts.write_text("".join(line for line in lines if json.loads(line)["source"] == source), "utf-8")
            split = ["--split", "0.97,0.02,0.01"]
            if not tokens.exists():
                run("data_tools", "prepare", texts, "--tokenizer", tokenizer, "--output", tokens, *split)
            run(
                "data_tools",
                "pack",
                tokens,
                "--sequence-length",
                "256",
                "--method",
                "concat",
                "--output",
                packed[source],
            )
    return packed


def train(folder: Path, name: str, data: Path, steps: int, *words: str) -> Path:
    """Train, or go on with training; returns the run's export in fp32, of adapters merged with what they lie beside."""
    run_folder, exported = folder / name, folder / f"{name}-exported"
    schedule = [f"schedule.total_steps={steps}", "schedule.warmup_steps=20"]
    sets = [f"data.train={data}", f"data.validation.main={data}"]
    run("pretrain", "train", *RECIPE, f"name={name}", f"run_folder={run_folder}", *sets, *schedule, *words)
    if not exported.exists():
        run("pretrain", "export", run_folder, "--output", exported, "--dtype", "fp32")
    return exported


def our_losses(exported: Path, packed: dict[str, Path]) -> dict[str, float]:
    """By `pretrain evaluate`, on the held-out part of each source."""
    sets = [word for name, data in packed.items() for word in ("--data", f"{name}={data}")]
    found = json.loads(run("pretrain", "evaluate", exported, *sets, "--json"))["sets"]
    return {name: found[name]["loss"] for name in packed}


@torch.no_grad()
def losses_by_transformers(exported: Path, packed: dict[str, Path]) -> dict[str, float]:
    """Each piece of a document in a row alone, by `transformers` without a line of ours but the reading of rows."""
    network = AutoModelForCausalLM.from_pretrained(exported)
    losses = {}
    for name, data in packed.items():
        dataset = open_dataset(data / "validation")
        total, targets = 0.0, 0
        for number in range(dataset.row_count(256)):
            row = dataset.row(number, 256)
            for start, end in zip(row.starts.tolist(), [*row.starts[1:].tolist(), row.used], strict=True):
                ids = [int(token) for token in row.tokens[start:end]]
                labels = ids[1:] + ([row.next_token] if row.next_token is not None and end == row.used else [])
                logits = network(input_ids=torch.tensor([ids])).logits[0, : len(labels)]
                total += float(
                    torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.long), reduction="sum")
                )
                targets += len(labels)
        losses[name] = total / targets
    return losses


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: one that is removed at the end")
    parser.add_argument("--steps", type=int, default=300, help="on the first source (default: 300)")
    parser.add_argument("--more-steps", type=int, default=120, help="on the second (default: 120)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if show(options.folder or Path(temporary), options.steps, options.more_steps) else 1)


def show(folder: Path, steps: int, more_steps: int) -> bool:
    """Print the table; True where all is as it must be."""
    packed = prepare(folder)
    exported = {"before": train(folder, "before", packed[FIRST], steps)}
    imported = folder / "imported"
    if not imported.exists():
        run("pretrain", "import", exported["before"], "--output", imported)
    for name, words in CONTINUATIONS.items():
        begin = ["model=null", f"model.weights={imported}"]
        exported[name] = train(folder, name, packed[SECOND], more_steps, *begin, *words)
    lines = ["", f"| held-out loss, nats a token | {FIRST} | {SECOND} | by transformers: {FIRST} | {SECOND} |"]
    lines.append("|---|---:|---:|---:|---:|")
    is_right = True
    before = {}
    for name, model in exported.items():
        ours, theirs = our_losses(model, packed), losses_by_transformers(model, packed)
        values = [*ours.values(), *theirs.values()]
        lines.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} |")
        before = before or ours
        is_right &= all(abs(ours[source] - theirs[source]) < LOSSES_DIFFER * ours[source] for source in packed)
        is_right &= name == "before" or ours[SECOND] < before[SECOND] - 0.1
    print("\n".join(lines))
    return is_right


if __name__ == "__main__":
    main()
