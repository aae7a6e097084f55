"""Choice of tokens: against transformers' processors, as frequencies, and without a say of neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pretrain.errors import ConfigError
from pretrain.inference.sampling import Choice, Sampling, choose_tokens, kept_probabilities

VOCABULARY = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def choice(sampling: Sampling, *, position: int = 0, copy: int = 0, seen: torch.Tensor | None = None) -> Choice:
    return Choice(sampling=sampling, copy=copy, position=position, seen=seen)


SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product((0.3, 1.0, 2.5), (0, 1, 7), (1.0, 0.9, 0.4, 1e-6))
]


def test_probabilities_are_those_of_the_processors_of_transformers() -> None:
    """All settings in one batch, where each row has its own."""
    scores = logits(len(SETTINGS))
    kept, tokens = kept_probabilities(scores, SETTINGS)
    ours = torch.zeros(kept.shape, dtype=torch.float64).scatter(1, tokens, kept)
    ours /= ours.sum(dim=-1, keepdim=True)
    for row, setting in enumerate(SETTINGS):
        theirs = TemperatureLogitsWarper(setting.temperature)(None, scores[row : row + 1])
        if setting.top_k:
            theirs = TopKLogitsWarper(setting.top_k)(None, theirs)
        if setting.top_p < 1:
            theirs = TopPLogitsWarper(setting.top_p)(None, theirs)
        torch.testing.assert_close(ours[row], theirs.double().softmax(dim=-1)[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 50.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    scores = logits(40, seed=1)
    seen = torch.randint(0, VOCABULARY, (40, 12), generator=torch.Generator().manual_seed(2))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, scores).argmax(dim=-1).tolist()
    greedy = Sampling(temperature=0, repetition_penalty=penalty)
    assert choose_tokens(scores, [choice(greedy, seen=row) for row in seen]) == theirs
    assert theirs != scores.argmax(dim=-1).tolist()


def test_tokens_come_as_often_as_their_probability() -> None:
    setting = Sampling(temperature=1.5, top_k=8, top_p=0.95, seed=11)
    scores = logits(1)
    kept, tokens = kept_probabilities(scores, [setting])
    expected = torch.zeros(VOCABULARY, dtype=torch.float64).scatter(0, tokens[0], kept[0] / kept.sum())
    draws = 20_000
    chosen = choose_tokens(scores.expand(draws, -1), [choice(setting, position=position) for position in range(draws)])
    counts = torch.bincount(torch.tensor(chosen), minlength=VOCABULARY)
    allowed = expected > 0
    assert int(counts[~allowed].sum()) == 0
    # chi-squared of at most 7 degrees of freedom: above 35 with a probability of 1e-5, and the seed is fixed
    surprise = ((counts[allowed] - draws * expected[allowed]) ** 2 / (draws * expected[allowed])).sum()
    assert float(surprise) < 35


def test_a_row_chooses_the_same_whatever_its_neighbours_are() -> None:
    scores = logits(6)
    seen = torch.tensor([1, 2, 3])
    wishes = [
        choice(Sampling(temperature=0)),
        choice(Sampling(temperature=1.0, seed=1)),
        choice(Sampling(temperature=2.0, top_k=5, seed=1), copy=1),
        choice(Sampling(temperature=2.0, top_p=0.5, seed=9), position=7),
        choice(Sampling(temperature=0, repetition_penalty=2.0), seen=seen),
        choice(Sampling(temperature=1.0, repetition_penalty=2.0), seen=seen),
    ]
    together = choose_tokens(scores, wishes)
    assert together == [choose_tokens(scores[row : row + 1], [wish])[0] for row, wish in enumerate(wishes)]


def test_seed_copy_and_position_each_change_the_draw() -> None:
    flat = torch.zeros(1, 100_000)

    def draw(seed: int, copy: int, position: int) -> int | None:
        setting = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        return choose_tokens(flat, [choice(setting, copy=copy, position=position)])[0]

    assert draw(1, 0, 0) == draw(1, 0, 0)
    assert len({draw(1, 0, 0), draw(2, 0, 0), draw(1, 1, 0), draw(1, 0, 1)}) == 4


def test_rows_that_are_not_numbers_are_told_and_harm_no_other() -> None:
    scores = logits(3)
    scores[1, 4] = torch.nan
    greedy, sampled = choice(Sampling(temperature=0)), choice(Sampling(temperature=1.0))
    assert choose_tokens(scores, [greedy, sampled, greedy]) == [int(scores[0].argmax()), None, int(scores[2].argmax())]


def test_bad_settings_are_refused_together() -> None:
    with pytest.raises(ConfigError) as refusal:
        Sampling(temperature=-1, top_p=0, top_k=-1, seed=-1, repetition_penalty=0)
    assert len(refusal.value.problems) == 5
