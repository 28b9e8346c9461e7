"""Real models: every weight that runs has an outcome, all are rewritten, and the numbers are those of float weights."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch

import et_cuda_passes as ecp
from demo.model import MissingRequirement
from et_cuda_passes.graph.report import Report
from tests.real.models import MODELS, Prepared, prepare

pytest.importorskip("transformers", reason="the real models are written in it: `make setup`, or pip install '.[demo]'")
pytestmark = pytest.mark.slow

# The error of 30 layers in bf16. A scale or a zero that is rounded differently differs by one unit in the last place.
RTOL = 2.0**-6
FUSED = {"smollm2": 150, "whisper": 16, "mixtral": 6, "mixtral_chosen": 6, "bert": 6, "vit": 6}


@cache
def prepared(name: str) -> Prepared:
    try:
        return prepare(name)
    except MissingRequirement as missing:
        pytest.skip(str(missing))


def lines(report: Report) -> str:
    """The report, and each outcome on its own line, without paths of this machine."""
    each = [f"{o.fqn}  {o.op}  {o.status}  {o.rule}  {o.detail}" for o in report.outcomes]
    return "\n".join([str(report), "", *each])


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_all_rewritten_and_the_report_is_golden(name: str, golden: Callable[[str, str], None]) -> None:
    model = prepared(name)
    before = str(model.program.graph)
    program, report = ecp.rewrite(model.program, "cuda")
    assert Counter(o.fqn for o in report.outcomes) == Counter(model.calls)
    assert report.counts()["rewritten"] == len(model.calls)
    with torch.no_grad():
        got = program.module()(**model.inputs).logits
    assert off(got, model.wanted) <= RTOL
    assert str(model.program.graph) == before
    golden(f"real/{name}", lines(report))


@pytest.mark.parametrize("target", ["metal", "cpu", "xnnpack"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "smollm2"])
def test_on_every_other_target(name: str, target: str) -> None:
    model = prepared(name)
    # Metal has no kernel for a product with experts.
    missed = len(model.experts) if target == "metal" else 0
    expect = {"rewritten": len(model.calls) - missed, "missed": missed}
    program, _ = ecp.rewrite(model.program, target, expect=expect)
    with torch.no_grad():
        assert off(program.module()(**model.inputs).logits, model.wanted) <= RTOL


@pytest.mark.parametrize("name", MODELS)
def test_linears_of_one_input_are_fused(name: str) -> None:
    """q, k and v; gate and up; in a decoder with cross-attention k and v of all layers, which read one encoding."""
    model = prepared(name)
    others = (rule for rule in ecp.default_passes("cuda") if rule.name != "fused_linear_int4")
    passes = [ecp.FusedLinearInt4(), *others]
    expect = {"fused_linear_int4": FUSED[name], "rewritten": len(model.calls), "missed": 0}
    program, _ = ecp.rewrite(model.program, "cuda", passes, expect)
    with torch.no_grad():
        assert off(program.module()(**model.inputs).logits, model.wanted) <= RTOL


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_tied_table_of_words_is_one_int8_constant(target: str) -> None:
    """The embedding and the last linear share one int8 table; all other linears are in int4."""
    model = prepared("smollm2")
    expect = {"embedding_int8": 1, "linear_int8": 1, "rewritten": 212, "missed": 0}
    expect |= {"fused_linear_int4": 90, "linear_int4": 120} if target == "cuda" else {"linear_int4": 210}
    program, report = ecp.rewrite(model.program, target, expect=expect)
    tied = [(o.op, o.rule) for o in report.outcomes if o.fqn == "model.embed_tokens.weight"]
    assert tied == [("aten.embedding", "embedding_int8"), ("aten.linear", "linear_int8")]
    words = {
        name: tuple(t.shape) for name, t in program.state_dict.items() if "embed_tokens" in name or "lm_head" in name
    }
    assert words == {"model.embed_tokens.weight.packed": (49152, 576), "model.embed_tokens.weight.scale": (49152, 1)}
    tables = program.graph.find_nodes(op="placeholder", target="p_model_embed_tokens_weight_packed")
    assert [len(node.users) for node in tables] == [2]
    with torch.no_grad():
        assert off(program.module()(**model.inputs).logits, model.wanted) <= RTOL
