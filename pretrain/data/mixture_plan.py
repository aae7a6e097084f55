"""From the data section to a mixture: names, weights by phase, limits; and what is wrong with them.

Needs sizes only where asked for; imports no numpy, so that `pretrain check` stays quick. The mixing is mixture.py's.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from pretrain.config_data import DataSection, MixturePhase, Source
from pretrain.errors import Problem


def source_name(source: Source) -> str:
    """What reports and phases call a source."""
    return source.name or Path(source.path).name


def mixture_problems(data: DataSection) -> list[Problem]:
    """What is wrong with names, weights and phases, as far as no sizes are needed."""
    return [*_name_problems(data), *_weight_problems(data), *_phase_problems(data)]


def initial_weights(data: DataSection, tokens: Sequence[int]) -> list[float]:
    """The weights of the start, one a source of so many tokens.

    With a temperature T: tokens ** (1 / T) in proportion to the largest, to four digits, so that the last bit of a
    machine's power function changes no order. T = 1 reads all sources at the same rate; the larger T, the more equal
    the sources (Conneau et al. 2020, "Unsupervised cross-lingual representation learning at scale", section 3.1).
    """
    temperature = data.mixture.temperature
    if temperature is None:
        return [1.0 if source.weight is None else source.weight for source in data.sources]
    largest = max(tokens)
    return [float(f"{(count / largest) ** (1 / temperature):.4g}") for count in tokens]


def phase_weights(data: DataSection, phase: MixturePhase) -> tuple[float, ...]:
    """The weights of a phase in the order of the sources."""
    return tuple(phase.weights[source_name(source)] for source in data.sources)


def first_sample(phase: MixturePhase, sequence_length: int) -> int:
    """Where a phase begins: the first row that starts at its token count or after it."""
    return -(-phase.from_tokens // sequence_length)


def row_limit(source: Source, rows: int) -> int | None:
    """How many rows a source may give; a part of a row is not given."""
    return None if source.max_epochs is None else int(Fraction(repr(source.max_epochs)) * rows)


def _name_problems(data: DataSection) -> Iterator[Problem]:
    for name, count in Counter(map(source_name, data.sources)).items():
        if count > 1:
            change = "give each of them a name: data.train: [{path: ..., name: ...}]"
            yield Problem(f"{count} training sources are called {name!r}", "a name for each, for the reports", change)


def _weight_problems(data: DataSection) -> Iterator[Problem]:
    weighted = [source_name(source) for source in data.sources if source.weight is not None]
    if data.mixture.temperature is not None and weighted:
        found = f"data.mixture.temperature is given, and weights for {', '.join(weighted)}"
        yield Problem(found, "weights from sizes, or given ones", "remove the temperature or the weights")
    elif data.sources and all(source.weight == 0 for source in data.sources):
        yield Problem("every training source has weight 0", "one weight above 0", "raise the weight of a source")


def _phase_problems(data: DataSection) -> Iterator[Problem]:
    names = [source_name(source) for source in data.sources]
    for index, phase in enumerate(data.mixture.phases):
        place = f"data.mixture.phases[{index}]"
        if index and phase.from_tokens <= (before := data.mixture.phases[index - 1].from_tokens):
            found = f"{place}.from_tokens is {phase.from_tokens}, the phase before begins at {before}"
            yield Problem(found, f"more than {before}", "order the phases by from_tokens")
        for name in phase.weights.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=1)
            change = f"did you mean {near[0]}?" if near else f"remove {name}"
            yield Problem(f"{place}.weights names {name}, which is no training source", ", ".join(names), change)
        if missing := [name for name in names if name not in phase.weights]:
            change = f"add {', '.join(missing)}, with 0 where nothing is to be read"
            yield Problem(f"{place}.weights lacks {', '.join(missing)}", "a weight for every source", change)
        elif not any(phase.weights.values()):
            yield Problem(f"{place}: every weight is 0", "one weight above 0", "raise the weight of a source")
