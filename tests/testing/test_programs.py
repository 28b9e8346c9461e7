"""The builders of small programs: each has the weights, dtype, dynamic axis and sharing of its arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_rewrites, attention, embedding, experts, floats, gated_layer, linear

Build = Callable[..., ExportedProgram]
RULES: dict[Build, dict[str, int]] = {
    linear: {"linear_int4": 1},
    gated_layer: {"linear_int4": 3},
    attention: {"linear_int4": 4},
    embedding: {"embedding_int4": 1},
    experts: {"indexed_bmm_int4": 1},
}
"""Each builder with what the cpu makes of it, in int4."""
BUILDERS = pytest.mark.parametrize("build", RULES, ids=lambda build: build.__name__)


@BUILDERS
def test_builder_has_the_weights_that_the_rules_rewrite(build: Build) -> None:
    _, report = assert_rewrites(build(), "cpu", expect={**RULES[build], "missed": 0})
    assert {outcome.detail.partition(" -> ")[0].rpartition(", ")[2] for outcome in report.outcomes} == {"int4 group 32"}


@BUILDERS
@pytest.mark.parametrize(("scheme", "group"), [("8w", 0), ("4w", 16)])
def test_builder_quantizes_with_the_scheme_and_the_group_size(scheme: str, group: int, build: Build) -> None:
    _, report = ecp.rewrite(build(scheme, group), "cpu", [ecp.LinearInt4(), ecp.EmbeddingInt4(), ecp.IndexedBmmInt4()])
    found = " ".join(str(text) for outcome in report.outcomes for text in (outcome.detail, *outcome.reasons))
    assert (
        "found 8 bits, -128..127" if scheme == "8w" else "group 16" if build is not experts else "found group size 16"
    ) in found


@BUILDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_builder_has_the_dtype_of_its_argument(dtype: torch.dtype, build: Build) -> None:
    program = build(dtype=dtype)
    values = [node.meta["val"] for node in program.graph.nodes if "dequantize_affine" in str(node.target)]
    assert values and {value.dtype for value in values} == {dtype}


@BUILDERS
def test_builder_has_a_dynamic_axis_where_wanted(build: Build) -> None:
    static, dynamic = build(), build(dynamic=True)
    assert not static.range_constraints
    (bounds,) = dynamic.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (2, 64)
    args, _ = dynamic.example_inputs or ((), {})
    assert_rewrites(dynamic, "cpu", expect={**RULES[build], "missed": 0})
    axis = 1 if build in (attention, embedding) else 0
    longer = tuple(torch.cat([arg, arg], axis) for arg in args)
    assert_rewrites(dynamic, "cpu", inputs=longer)


SHARED: dict[Build, dict[str, int]] = {
    linear: {"linear_int4": 2},
    gated_layer: {"linear_int4": 3},
    attention: {"linear_int4": 4},
    embedding: {"linear_int4": 1, "embedding_int4": 1},
    experts: {"indexed_bmm_int4": 2},
}


@BUILDERS
def test_builder_shares_a_weight_where_wanted(build: Build) -> None:
    program, report = assert_rewrites(build(shared=True), "cuda", expect={"missed": 0})
    readers = [outcome.fqn for outcome in report.outcomes]
    alone = [outcome.fqn for outcome in ecp.rewrite(build(), "cuda")[1].outcomes]
    assert len(set(readers)) == len(readers) - 1
    assert len(set(alone)) == len(alone)
    packed = [name for name in program.state_dict if name.endswith((".packed", ".packed_gated", ".q", ".packed_2"))]
    assert len(packed) <= len(set(readers))
    assert sum(SHARED[build].values()) >= len(readers) - 1


def test_linear_without_a_scheme_is_not_quantized() -> None:
    assert ecp.rewrite(linear(None), "cpu")[1].outcomes == []


def test_linear_has_what_is_computed_of_its_result() -> None:
    program = linear(use=torch.relu, bias=False, in_features=32, out_features=8)
    x = floats(3, 32)
    assert program.module()(x).shape == (3, 8) and float(program.module()(x).min()) == 0.0


def test_gated_layer_is_one_kernel_on_cuda() -> None:
    assert_rewrites(gated_layer(), "cuda", expect={"fuse_gate": 1, "missed": 0}, rtol=2**-6)
    assert_rewrites(gated_layer(activation=F.relu), "cuda", expect={"fuse_gate": 1}, rtol=2**-6)


def test_attention_without_a_mask_gets_our_operator() -> None:
    options: dict[str, Any] = {"heads": 4, "kv_heads": 4}
    assert ecp.rewrite(attention(**options), "cuda")[1].applied["unmasked_attention"] == 1
    assert "unmasked_attention" not in ecp.rewrite(attention(causal=True), "cuda")[1].applied


def test_dynamic_activations_are_kept_for_xnnpack() -> None:
    _, report = ecp.rewrite(linear("8da4w", dtype=torch.float32), "xnnpack", expect={"keep_dynamic_int4": 1})
    assert report.outcomes[0].status == "kept"


def test_experts_of_another_scheme_are_refused() -> None:
    with pytest.raises(ValueError, match="experts are quantized with 4w or 8w, not with '8da4w'"):
        experts("8da4w")


@BUILDERS
def test_builder_gives_the_same_weights_each_time(build: Build) -> None:
    one, two = build().state_dict, build().state_dict
    assert one.keys() == two.keys()
    for name, value in one.items():
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        for part in parts:
            assert torch.equal(getattr(value, part), getattr(two[name], part))
        if not parts:
            assert torch.equal(value, two[name])
