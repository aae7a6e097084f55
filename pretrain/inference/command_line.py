"""`pretrain generate`: its options and how they fit together. Parse and call.

Importing this file imports nothing heavy, so that the command line's help stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE.jsonl",
        help='Lines as {"prompt": "..."}, with id, seed, stop, max_new_tokens and the like where wanted; -: stdin.',
    ),
]
Stops = Annotated[list[str] | None, typer.Option("--stop", help="End a text before this; may be given several times.")]


def generate(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run folder, a checkpoint folder, or a Hugging Face folder.")
    ],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(max=1.0, help="Sample from the likeliest tokens up to this.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what was there before.")] = 1.0,
    stop: Stops = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds write equal text, whatever else is asked.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are continued at the same time.")] = 32,
    stream: Annotated[bool, typer.Option("--stream", help="Print pieces as they come; one prompt, or --json.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines; of --prompts always.")] = False,
) -> None:
    """Continue prompts."""
    from pretrain.errors import ConfigError, Problem
    from pretrain.inference.prompt_file import read_prompts

    lines = read_prompts(prompt or [], prompts)
    as_json = as_json or prompts is not None
    if stream and not as_json and len(lines) > 1:
        raise ConfigError(
            Problem(f"--stream with {len(lines)} prompts", "one prompt", "add --json, whose pieces have an index")
        )
    from pretrain.inference.print_answers import print_answers
    from pretrain.inference.sampling import Sampling

    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed
    )
    print_answers(
        source,
        lines,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stops=stop or (),
        rows_at_a_time=batch_size,
        as_json=as_json,
        is_streamed=stream,
    )
