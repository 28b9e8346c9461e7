"""The exported decoder, compared with transformers' model without a cache, buffers or positions."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from demo.program import export, quantize, report_of, save_rewritten
from tests.demo.tiny import CACHE_LENGTH, LINEARS, tiny_model

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]])
LENGTH = TOKENS.shape[1]


def start(position: int) -> Tensor:
    return torch.tensor([position])


@pytest.fixture(scope="module")
def exact() -> ExportedProgram:
    """The program in float32: the order of a sum changes little there, a wrong position or mask much."""
    return export(tiny_model(torch.float32), CACHE_LENGTH)


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """The logits after every token, computed from the whole text at once."""
    with torch.no_grad():
        return tiny_model(torch.float32)(TOKENS, use_cache=False).logits[0]


def test_prompt_in_one_call_agrees_with_transformers(exact: ExportedProgram, wanted: Tensor) -> None:
    logits = exact.module()(TOKENS, start(0))
    assert logits.shape == (1, 1, 128)
    torch.testing.assert_close(logits[0, 0], wanted[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [1, 5, LENGTH - 1])
def test_prompt_and_single_tokens_agree_with_transformers(exact: ExportedProgram, wanted: Tensor, first: int) -> None:
    run = exact.module()
    run(TOKENS[:, :first], start(0))
    for position in range(first, LENGTH):
        logits = run(TOKENS[:, position : position + 1], start(position))
        torch.testing.assert_close(logits[0, 0], wanted[position], rtol=0, atol=1e-5)


def test_new_text_needs_no_reset(exact: ExportedProgram, wanted: Tensor) -> None:
    run = exact.module()
    run(TOKENS.flip(1), start(0))
    torch.testing.assert_close(run(TOKENS, start(0))[0, 0], wanted[-1], rtol=0, atol=1e-5)


def test_whole_cache_can_be_used(exact: ExportedProgram) -> None:
    tokens = torch.arange(CACHE_LENGTH)[None]
    with torch.no_grad():
        expected = tiny_model(torch.float32)(tokens, use_cache=False).logits[0, -1]
    torch.testing.assert_close(exact.module()(tokens, start(0))[0, 0], expected, rtol=0, atol=1e-5)


def test_quantizing_takes_every_linear_and_leaves_the_embedding() -> None:
    model = tiny_model()
    embedding = model.model.embed_tokens.weight.clone()
    quantize(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [type(linear.weight).__name__ for linear in linears] == ["IntxUnpackedToInt8Tensor"] * LINEARS
    assert all(linear.weight.block_size == (1, 32) for linear in linears)
    assert all(not linear.weight.zero_point.any() for linear in linears)
    assert type(model.model.embed_tokens.weight) is nn.Parameter
    assert torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_saved_program_is_rewritten(tmp_path, target: str) -> None:  # type: ignore[no-untyped-def]
    generic = export(quantize(tiny_model()), CACHE_LENGTH)
    path = tmp_path / f"partial-{target}.pt2"
    save_rewritten(generic, target, path)
    assert f"{LINEARS} candidates: {LINEARS} rewritten, 0 kept, 0 missed" in report_of(tmp_path / f"{target}.pt2")
    wanted = generic.module()(TOKENS, start(0)).double()
    found = torch.export.load(path).module()(TOKENS, start(0)).double()
    # Integers and scales are equal, so only the rounding and summing of bfloat16 products differs.
    assert (found - wanted).norm() / wanted.norm() < 0.01
