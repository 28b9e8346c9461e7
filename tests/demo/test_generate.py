"""Greedy decoding with programs whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from demo.generate import ROUNDS, answer, check_fits, take_turns

END = 9


class Successor:
    """A program that answers n + 1 after a token n, and records its inputs."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, tokens: Tensor, start: Tensor) -> Tensor:
        self.calls.append((tokens[0].tolist(), int(start)))
        logits = torch.zeros(1, 1, 20)
        logits[0, 0, int(tokens[0, -1]) + 1] = 1
        return logits


def test_answer_ends_with_the_end_token() -> None:
    run = Successor()
    assert answer(run, [1, 6], 40, END).tokens == (7, 8, 9)
    assert run.calls == [([1, 6], 0), ([7], 2), ([8], 3)]


def test_answer_ends_at_the_limit() -> None:
    assert answer(Successor(), [2], 3, END).tokens == (3, 4, 5)


def test_answer_may_be_the_end_token_alone() -> None:
    results = take_turns({"run": Successor()}, [[8]], 5, END, lambda: None)
    assert results["run"].answers[0].tokens == (9,)
    assert math.isnan(results["run"].tokens_per_second)


def test_programs_take_turns() -> None:
    order: list[str] = []
    steps: list[None] = []

    class Named(Successor):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __call__(self, tokens: Tensor, start: Tensor) -> Tensor:
            if int(start) == 0:
                order.append(self.name)
            return super().__call__(tokens, start)

    results = take_turns({"a": Named("a"), "b": Named("b")}, [[1], [6]], 4, END, lambda: steps.append(None))
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * ROUNDS
    assert len(steps) == 4 * ROUNDS
    assert [a.tokens for a in results["b"].answers] == [(2, 3, 4, 5), (7, 8, 9)]
    assert results["b"].tokens_per_second > 0


def test_prompt_that_does_not_fit_is_rejected_with_the_numbers() -> None:
    check_fits([[1] * 8], 40, 48)
    with pytest.raises(ValueError, match="a prompt of 9 tokens and an answer of 40 do not fit into 48"):
        check_fits([[1], [1] * 9], 40, 48)
