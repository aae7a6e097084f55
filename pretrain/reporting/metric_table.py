"""Every number of metrics.jsonl: name, meaning, unit and how people read it. One truth for views and documentation.

Computes nothing. `<...>` in a name stands for a text of the run, such as a dataset's name. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One kind of number."""

    name: str  # as in metrics.jsonl and in every tracker
    title: str
    unit: str  # of the number in the file; empty: none
    meaning: str
    form: str = "{:.4g}"  # how people read it, after `scale`
    scale: float = 1.0
    has_curve: bool = False  # on the page of `pretrain monitor --html`
    is_shown: bool = False  # newest value on the terminal

    def matches(self, name: str) -> bool:
        """Whether a name of a line is of this kind."""
        pattern = "".join(
            ".+" if part.startswith("<") else re.escape(part) for part in re.split("(<[^>]+>)", self.name)
        )
        return re.fullmatch(pattern, name) is not None


METRICS = (
    Metric(name="step", title="Step", unit="steps", meaning="Optimizer updates since the start of the run."),
    Metric(name="time", title="Time", unit="s", meaning="Since 1970 (UTC), when the line was written."),
    Metric(
        name="tokens",
        title="Tokens",
        unit="tokens",
        meaning="Read since the start of the run: rows x sequence length, padding included.",
        form="{:,.0f}",
        is_shown=True,
    ),
    Metric(
        name="loss",
        title="Loss",
        unit="nats a token",
        meaning="Mean cross-entropy over the target tokens of this step's global batch; with the weighted loss of"
        " routers, without the z-loss.",
        form="{:.4f}",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="loss/<source>",
        title="Loss of a source",
        unit="nats a token",
        meaning="Mean cross-entropy over the target tokens of one source of a mixture, since the last line;"
        " absent where it gave none.",
        form="{:.4f}",
    ),
    Metric(
        name="z_loss",
        title="Z-loss",
        unit="nats squared",
        meaning="Mean of logsumexp(logits)^2 over the same tokens, before its weight `loss.z_loss`.",
        has_curve=True,
    ),
    Metric(name="perplexity", title="Perplexity", unit="", meaning="exp(loss).", form="{:,.2f}"),
    Metric(
        name="bits_per_byte",
        title="Bits per byte",
        unit="bits a byte",
        meaning="loss / ln 2 / bytes a token, which are measured at the start on some 65,000 tokens of each source and"
        " weighted by what the sources have given; absent without a tokenizer.json in the run folder.",
        form="{:.4f}",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="learning_rate",
        title="Learning rate",
        unit="",
        meaning="Of this step's update.",
        form="{:.2e}",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="grad_norm",
        title="Gradient norm",
        unit="",
        meaning="L2 norm of the whole gradient of this step, before clipping.",
        form="{:.3f}",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="update_ratio/<group>",
        title="Update to weight ratio",
        unit="",
        meaning="L2 norm of this step's change of the group's weights over the norm before it. Groups: embeddings, each"
        " layer, head, other. Every `reporting.update_ratios_every_steps` (default: never); absent after a skipped"
        " step.",
        form="{:.2e}",
    ),
    Metric(
        name="tokens_per_second",
        title="Throughput",
        unit="tokens a second",
        meaning="Of all ranks, over the steps since the last line; saves and validation left out.",
        form="{:,.0f} tokens/s",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="step_seconds",
        title="Time of a step",
        unit="s",
        meaning="Mean over the steps since the last line; saves and validation left out.",
        form="{:,.0f} ms",
        scale=1000.0,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="data_seconds",
        title="Data",
        unit="s a step",
        meaning="Waiting for rows, in `step_seconds`.",
        form="{:.1f} ms",
        scale=1000.0,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="forward_backward_seconds",
        title="Forward and backward",
        unit="s a step",
        meaning="Of rank 0, in `step_seconds`; collectives that run meanwhile, without a wait for them, included.",
        form="{:,.0f} ms",
        scale=1000.0,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="optimizer_seconds",
        title="Optimizer",
        unit="s a step",
        meaning="Of rank 0, in `step_seconds`: norm, clipping, update.",
        form="{:,.0f} ms",
        scale=1000.0,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="communication_seconds",
        title="Communication",
        unit="s a step",
        meaning="Of rank 0, in `step_seconds` and in no other part: waiting for collectives and messages, and so for"
        " slower ranks. Absent with one rank, and with FSDP on GPUs, whose streams wait for each other; what DeepSpeed"
        " reduces on a stream of its own is not in it.",
        form="{:,.0f} ms",
        scale=1000.0,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="mfu",
        title="Model FLOPs utilisation",
        unit="of the peak",
        meaning="tokens/s x model FLOPs a token / (ranks x dense bf16 peak of the device). FLOPs a token: 6 x weights"
        " in matrix products + 12 x layers x attention width x visible keys; recomputation not counted. Peaks:"
        " `PEAK_FLOPS` in pretrain/models/flops.py, by the device's name; absent where it is not there, as on CPUs.",
        form="{:.1%}",
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="hfu",
        title="Hardware FLOPs utilisation",
        unit="of the peak",
        meaning="The same with the forward that recomputation repeats.",
        form="{:.1%}",
        has_curve=True,
    ),
    Metric(
        name="memory_bytes",
        title="Memory",
        unit="bytes",
        meaning="Of rank 0: the most that tensors held so far on its GPU; on a CPU, what the process holds now.",
        form="{:.2f} GiB",
        scale=1 / 2**30,
        has_curve=True,
        is_shown=True,
    ),
    Metric(
        name="skipped",
        title="Skipped steps",
        unit="steps",
        meaning="Since the last line: not finite, or held back as spikes; their weights stayed as they were.",
        form="{:.0f}",
    ),
    Metric(name="loss_scale", title="Loss scale", unit="", meaning="Of fp16."),
    Metric(
        name="data/<source>/tokens",
        title="Tokens of a source",
        unit="tokens",
        meaning="That the source has given since the start of the run.",
        form="{:,.0f}",
    ),
    Metric(
        name="data/<source>/epochs",
        title="Epochs of a source",
        unit="",
        meaning="How often it was read through.",
        form="{:.3f}",
    ),
    Metric(
        name="router/loss",
        title="Router loss",
        unit="",
        meaning="Balancing loss of a mixture of experts, before its weight.",
    ),
    Metric(
        name="router/load_<extreme>",
        title="Load of experts",
        unit="of an even share",
        meaning="Of the fullest (max) and emptiest (min) expert, of all layers; with /LAYER of one.",
    ),
    Metric(
        name="router/share/<layer>/<expert>",
        title="Share of an expert",
        unit="",
        meaning="Of the tokens of its layer; where there are at most 1,024 experts.",
    ),
    Metric(
        name="validation/<set>/loss",
        title="Validation loss",
        unit="nats a token",
        meaning="Mean cross-entropy over the target tokens of the set.",
        form="{:.4f}",
        is_shown=True,
    ),
    Metric(
        name="validation/<set>/bits_per_byte",
        title="Validation bits per byte",
        unit="bits a byte",
        meaning="Of the set, as above.",
        form="{:.4f}",
    ),
    Metric(
        name="validation/<set>/perplexity",
        title="Validation perplexity",
        unit="",
        meaning="exp(loss) of the set.",
        form="{:,.2f}",
    ),
    Metric(
        name="checkpoint/step",
        title="Saved step",
        unit="steps",
        meaning="Whose save ended by this line; `checkpoint/failed` is 1 where it could not be written.",
    ),
    Metric(name="checkpoint/failed", title="Failed save", unit="", meaning="1; training goes on without it."),
    Metric(name="checkpoint/bytes", title="Size of a save", unit="bytes", meaning="Of all ranks' files."),
    Metric(
        name="checkpoint/stall_seconds", title="Stall of a save", unit="s", meaning="That training stood still for it."
    ),
    Metric(name="checkpoint/write_seconds", title="Writing a save", unit="s", meaning="Behind training."),
    Metric(name="checkpoint/copy_<what>", title="Durable copies", unit="", meaning="step, seconds, or failed (1)."),
)


def metric_of(name: str) -> Metric | None:
    """The kind of a name in a line; null where the table has none."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


def markdown_lines() -> Iterator[str]:
    """The table for the README."""
    yield "| name | unit | what |"
    yield "|---|---|---|"
    for metric in METRICS:
        yield f"| `{metric.name}` | {metric.unit} | {metric.meaning} |"


def plain_lines() -> Iterator[str]:
    """The table for a terminal."""
    for metric in METRICS:
        yield f"{metric.name}  [{metric.unit}]" if metric.unit else metric.name
        yield f"    {metric.meaning}"
