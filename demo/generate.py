"""Compiles programs with AOTInductor for this machine's CPU, and decodes greedily."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

ROUNDS = 3
"""Number of rounds of take_turns; the speeds are medians over the rounds."""

Run = Callable[[Tensor, Tensor], Tensor]
"""The signature of Decoder.forward: tokens [1, n] and start [1] to the logits [1, 1, vocabulary]."""


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and the seconds for its first token and for the others."""

    tokens: tuple[int, ...]
    first: float
    others: float


def compile_for_cpu(program: ExportedProgram, package: Path) -> None:
    """Compile `program` with AOTInductor into the .pt2 `package`."""
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))


def load_package(package: Path) -> Run:
    """Load the compiled program in `package`."""
    run: Run = torch._inductor.aoti_load_package(str(package))
    return run


@torch.no_grad()
def answer(run: Run, prompt: Sequence[int], limit: int, end: int) -> Answer:
    """Continue `prompt` with the likeliest token each time, until `end` or for `limit` tokens."""
    tokens: list[int] = []
    times = [time.perf_counter()]
    step, start = list(prompt), 0
    while len(tokens) < limit and (not tokens or tokens[-1] != end):
        logits = run(torch.tensor([step]), torch.tensor([start]))
        tokens.append(int(logits[0, -1].argmax()))
        times.append(time.perf_counter())
        start += len(step)
        step = tokens[-1:]
    return Answer(tuple(tokens), times[1] - times[0], times[-1] - times[1])


@dataclass(frozen=True)
class Result:
    """The answers of one program to all prompts, and its speed: the median of the rounds."""

    answers: tuple[Answer, ...]
    seconds_to_first: float
    tokens_per_second: float


def take_turns(
    runs: Mapping[str, Run], prompts: Sequence[Sequence[int]], limit: int, end: int, advance: Callable[[], None]
) -> dict[str, Result]:
    """Let the programs answer all prompts in turns, so that other load on the machine affects them equally.

    The speed is that of decoding: the tokens after the first one of each answer, divided by their time. The time to the
    first token is the mean over the prompts. `advance` is called after each of ROUNDS * len(runs) * len(prompts)
    answers.
    """
    rounds: dict[str, list[tuple[Answer, ...]]] = {name: [] for name in runs}
    for run in runs.values():
        # The first run allocates memory and starts threads, so it is not measured.
        answer(run, prompts[0], 2, end)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            answers = []
            for prompt in prompts:
                answers.append(answer(run, prompt, limit, end))
                advance()
            rounds[name].append(tuple(answers))
    return {name: _result(answered) for name, answered in rounds.items()}


def _result(rounds: Sequence[tuple[Answer, ...]]) -> Result:
    def speed(answers: tuple[Answer, ...]) -> float:
        seconds = sum(a.others for a in answers)
        # Every answer ended with its first token, so no time was measured.
        return sum(len(a.tokens) - 1 for a in answers) / seconds if seconds else math.nan

    return Result(
        rounds[-1],
        statistics.median(statistics.mean(a.first for a in answers) for answers in rounds),
        statistics.median(map(speed, rounds)),
    )


def check_fits(prompts: Sequence[Sequence[int]], limit: int, cache_length: int) -> None:
    """Raise ValueError unless every prompt and an answer of `limit` tokens fit into the cache."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + limit > cache_length:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {limit} do not fit into {cache_length}: "
            "shorten the prompt or lower --tokens"
        )


@torch.no_grad()
def save_errors(runs: Mapping[str, Run], exported: Mapping[str, Path], prompt: Sequence[int], path: Path) -> None:
    """Write to `path`, as JSON, the error of each program's logits after `prompt`, compared with its exported program.

    The error is |found - wanted| / |wanted|, and the exported program runs in eager, operator by operator.
    """
    inputs = torch.tensor([list(prompt)]), torch.zeros(1, dtype=torch.int64)
    errors = {}
    for name, run in runs.items():
        wanted = torch.export.load(exported[name]).module()(*inputs).double()
        errors[name] = float((run(*inputs).double() - wanted).norm() / wanted.norm())
    path.write_text(json.dumps(errors, indent=2) + "\n", encoding="utf-8")
