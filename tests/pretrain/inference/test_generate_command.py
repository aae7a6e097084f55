"""`pretrain generate`: prompts from options and files, JSON lines, streaming, and what is wrong with a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.__main__ import run_command_line
from pretrain.errors import ConfigError
from pretrain.inference.generate import continue_prompts
from pretrain.inference.load import load_source
from pretrain.inference.prompt_file import read_prompts
from pretrain.inference.sampling import Sampling
from tests.pretrain.inference.tiny_runs import SENTENCES, build_network, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, build_network("llama"))
    return folder


def generate(run: Path, *options: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert run_command_line(["generate", str(run), "--max-new-tokens", "9", *options]) == 0
    return capfd.readouterr().out


def test_texts_follow_their_prompts(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = generate(run, "-p", SENTENCES[0], "-p", SENTENCES[1], "--temperature", "0", capfd=capfd)
    texts = continue_prompts(load_source(run), SENTENCES[:2], max_new_tokens=9, sampling=Sampling(temperature=0))
    assert out == f"{SENTENCES[0]}{texts[0]}\n\n{SENTENCES[1]}{texts[1]}\n"
    assert generate(run, "-p", SENTENCES[0], "--temperature", "0", "--stream", capfd=capfd) == (
        SENTENCES[0] + texts[0] + "\n"
    )


def test_lines_of_a_file_have_settings_of_their_own(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": SENTENCES[0], "id": "first"},
        {"prompt": SENTENCES[0], "seed": 8, "max_new_tokens": 4},
        {"prompt": SENTENCES[1], "temperature": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = generate(run, "-p", SENTENCES[2], "--prompts", str(file), "--seed", "3", "--batch-size", "2", capfd=capfd)
    answers = [json.loads(line) for line in out.splitlines()]
    model = load_source(run)

    def alone(prompt: str, count: int = 9, **settings: float) -> str:
        sampling = Sampling(**({"seed": 3} | settings))  # type: ignore[arg-type]
        return continue_prompts(model, [prompt], max_new_tokens=count, sampling=sampling)[0]

    assert [answer["text"] for answer in answers] == [
        alone(SENTENCES[2]),
        alone(SENTENCES[0]),
        alone(SENTENCES[0], 4, seed=8),
        alone(SENTENCES[1], temperature=0),
    ]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert [answer.get("id") for answer in answers] == [None, "first", None, None]
    assert (answers[2]["new_tokens"], answers[2]["finish_reason"]) == (4, "length")


def test_pieces_of_several_prompts_are_json_lines(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("-p", SENTENCES[0], "-p", SENTENCES[1])
    pieces = [json.loads(line) for line in generate(run, *options, "--stream", "--json", capfd=capfd).splitlines()]
    whole = [json.loads(line) for line in generate(run, *options, "--json", capfd=capfd).splitlines()]
    for index in (0, 1):
        text = "".join(piece["piece"] for piece in pieces if piece["index"] == index)
        assert text == whole[index]["text"]
    assert run_command_line(["generate", str(run), *options, "--stream"]) == 64


def test_every_bad_line_is_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "sed": 1}\n{"prompt": 3}\n\nnot JSON\n{"id": 1}\n{"prompt": "", "top_p": 0}\n')
    assert run_command_line(["generate", str(tmp_path / "nowhere"), "--prompts", str(file)]) == 64
    told = capsys.readouterr().err
    for part in ("line 1: sed", "line 2: prompt", "line 4: Invalid JSON", "line 5: prompt", "line 6: top_p"):
        assert part in told
    file.write_text("x\n" * 50)
    with pytest.raises(ConfigError, match="30 more such problems"):
        read_prompts([], file)


def test_no_prompt_and_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts([], None)
    with pytest.raises(ConfigError, match="a readable file"):
        read_prompts([], tmp_path / "none")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(["a"], tmp_path / "latin")
    monkeypatch.setattr("pretrain.inference.prompt_file.sys", SimpleNamespace(stdin=io.StringIO('{"prompt": "b"}')))
    assert [line.prompt for line in read_prompts(["a"], Path("-"))] == ["a", "b"]
