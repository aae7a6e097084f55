"""Published laws against their papers' own figures, repeated data, and laws found again in made-up runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pretrain.__main__ import run_command_line
from pretrain.config import ModelSection, RunConfig, save_config
from pretrain.errors import DataError
from pretrain.models.architecture import resolve_architecture
from pretrain.models.parameter_count import count_parameters
from pretrain.planning.request import llama_of_size
from pretrain.planning.run_fits import fit_runs, read_points
from pretrain.planning.scaling_laws import LAWS, best_point, effective_tokens, extra_flops, point

CHINCHILLA = 5.76e23  # FLOPs


def test_chinchilla_s_budget_gives_chinchilla_s_size() -> None:
    best = best_point(LAWS["besiroglu"], CHINCHILLA)
    assert best.parameters == pytest.approx(70e9, rel=0.05)
    assert best.tokens == pytest.approx(1.4e12, rel=0.06)
    assert best_point(LAWS["hoffmann"], CHINCHILLA).parameters == pytest.approx(32e9, rel=0.05)  # table A3's approach 3


@pytest.mark.parametrize("name", LAWS)
def test_no_other_size_is_better(name: str) -> None:
    law = LAWS[name]
    best = best_point(law, 1e22)
    assert best.parameters * best.tokens * 6 == pytest.approx(1e22)
    for factor in (0.8, 1.25):
        assert point(law, best.parameters * factor, best.tokens / factor).loss > best.loss
    assert extra_flops(law, best) == pytest.approx(0, abs=1e-6)
    small = point(law, best.parameters / 4, best.tokens * 4)
    saved = best_point(law, 1e22 * (1 - extra_flops(law, small)))
    assert saved.loss == pytest.approx(small.loss, rel=1e-6)


def test_repeated_tokens_count_less_and_never_more_than_their_limit() -> None:
    assert effective_tokens(1e9, 5e8) == 5e8
    assert effective_tokens(1e9, 4e9) == pytest.approx(3.72e9, rel=0.01)  # four epochs are worth nearly four
    assert effective_tokens(1e9, 1e15) == pytest.approx(16.39e9, rel=0.01)
    fresh, repeated = best_point(LAWS["muennighoff"], 1e22), best_point(LAWS["muennighoff"], 1e22, 20e9)
    assert repeated.loss > fresh.loss
    assert repeated.epochs > 1
    assert repeated.parameters < fresh.parameters


def make_runs(folder: Path, *, noise: float) -> list[Path]:
    generator, found = random.Random(0), []
    for size in (40e6, 80e6, 160e6, 320e6):
        for ratio in (10, 40):
            model = dict(llama_of_size(size))
            config = RunConfig.model_validate(
                {
                    "name": "run",
                    "model": model,
                    "data": {"train": "data"},
                    "batch": {"sequence_length": 512, "micro_batch_size": 4, "global_batch_size": 32},
                    "optimizer": {"learning_rate": 1e-3},
                    "schedule": {"total_steps": 10},
                }
            )
            parameters = count_parameters(resolve_architecture(ModelSection(**model), 512)).total
            tokens = parameters * ratio
            loss = LAWS["besiroglu"].loss(parameters, tokens) * (1 + generator.gauss(0, noise))
            place = folder / f"{size:.0f}-{ratio}"
            place.mkdir()
            save_config(config, place / "config.yaml")
            lines = [{"step": 10, "tokens": tokens, "loss": loss + 0.1}, {"step": 10, "validation/main/loss": loss}]
            text = "\n".join(json.dumps(line) for line in lines) + '\n{"cut'
            (place / "metrics.jsonl").write_text(text, encoding="utf-8")
            found.append(place)
    return found


def test_a_fit_finds_the_law_that_made_the_runs_and_its_band_holds_it(tmp_path: Path) -> None:
    fitted = fit_runs(read_points(make_runs(tmp_path, noise=0.003)))
    largest = max(run.flops for run in fitted.points)
    truth = best_point(LAWS["besiroglu"], 100 * largest)
    low, high = fitted.band(100 * largest)
    assert low < truth.loss < high
    assert best_point(fitted.law, 100 * largest).loss == pytest.approx(truth.loss, rel=0.04)
    assert fitted.band(1000 * largest)[1] - fitted.band(1000 * largest)[0] > high - low > 0
    small, large = fitted.size_band(10 * largest)
    assert small < best_point(LAWS["besiroglu"], 10 * largest).parameters < large


def test_fits_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, page = make_runs(tmp_path, noise=0.003), tmp_path / "out" / "law.html"
    assert run_command_line(["plan", "--fit", *map(str, runs), "--html", str(page)]) == 0
    assert "parameters^" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("<circle") == len(runs)
    assert "<polygon" in text
    with pytest.raises(DataError, match="4 runs or more"):
        fit_runs(read_points(runs[:3]))
    (tmp_path / "no run").mkdir()
    (runs[0] / "metrics.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        read_points([tmp_path / "no run", *runs])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--flops", "1e23"], 0),
        (["--flops", "1e23", "--unique-tokens", "100B"], 0),
        (["--flops", "x"], 64),
        (["--flops", "7"], 64),
        (["--flops", "1e23", "--html", "page.html"], 64),
        (["--flops", "1e23", "--model", "7b"], 64),
        (["--fit"], 65),
        (["some/run"], 64),
    ],
)
def test_budgets_by_command(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["plan", *words]) == code
    assert ("Besiroglu" in capsys.readouterr().out) == (code == 0)
