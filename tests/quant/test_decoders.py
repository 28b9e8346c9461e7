"""Decoders of dequantize operators: every argument form decodes to the same weight; other nodes raise with a reason."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.decoders import decode, is_dequantize
from et_cuda_passes.quant.weight import QuantizedWeight, has_data, weight_values
from et_cuda_passes.testing import Sketch, assert_misses
from tests.helpers import DEQUANTIZE

aten = torch.ops.aten
N, K, GROUP = 16, 64, 32


def only(program: torch.export.ExportedProgram) -> tuple[Program, Node]:
    """The program, copied, and its one dequantize."""
    copied = Program(program)
    (node,) = (n for n in copied.graph.nodes if "dequantize_affine" in str(n.target))
    return copied, node


def decoded(program: torch.export.ExportedProgram) -> QuantizedWeight:
    return decode(*only(program))


class Parts:
    """Constants of a quantized weight in a sketch, and the linear that reads it."""

    def __init__(self, storage: torch.dtype = torch.int8, zeros: bool = True, groups: int = K // GROUP) -> None:
        self.sketch = Sketch()
        low = 0 if storage is torch.uint8 else -8
        self.data = self.sketch.buffer("w.data", torch.randint(low, low + 16, (N, K)).to(storage))
        self.scale = self.sketch.buffer("w.scale", torch.rand(N, groups))
        points = torch.randint(low, low + 16, (N, groups)).to(storage)
        self.zero = self.sketch.buffer("w.zero", points) if zeros else None

    def program(self, *args: Any, raw: bool = False, target: Any = DEQUANTIZE, **kwargs: Any) -> Any:
        """linear(x, target(*args, **kwargs)); ``raw`` for arguments that the operator itself rejects."""
        build, extra = (self.sketch.raw, {"val": torch.empty(N, K)}) if raw else (self.sketch.call, {})
        return self.reading(build(target, *args, **kwargs, **extra))

    def reading(self, weight: Node) -> torch.export.ExportedProgram:
        return self.sketch.program(self.sketch.call(aten.linear.default, self.sketch.input("x", 2, K), weight))


# Argument forms ----------------------------------------------------------------------------------------------------


def test_decoded_weight_has_the_metadata_of_its_node() -> None:
    p = Parts()
    weight = decoded(p.program(p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7, torch.float32))
    assert (weight.fqn, weight.shape, weight.block_size) == ("w.data", (N, K), (1, GROUP))
    assert (weight.quant_min, weight.quant_max, weight.bits) == (-8, 7, 4)
    assert (weight.storage_dtype, weight.scale_dtype, weight.output_dtype) == (torch.int8, torch.float32, torch.float32)
    assert (weight.group_size, weight.scheme) == (GROUP, "int4 group 32")
    assert [node.name for node in weight.sources] == ["b_w_data", "b_w_scale", "b_w_zero"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.fqn = "other"  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_dtype_may_be_positional_keyword_or_absent(dtype: torch.dtype) -> None:
    forms: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((-8, 7, dtype), {}), ((-8, 7), {"output_dtype": dtype})]
    if dtype is torch.float32:
        forms.append(((-8, 7), {}))
    for args, kwargs in forms:
        p = Parts()
        node = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, *args, **kwargs)
        assert decoded(p.sketch.program(p.sketch.call(aten.neg.default, node))).output_dtype is dtype


@pytest.mark.parametrize(
    ("storage", "low", "high"), [(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int32, -(2**31), 2**31 - 1)]
)
@pytest.mark.parametrize("ends", [(), (None, None)], ids=["absent", "None"])
def test_absent_range_is_the_range_of_the_storage_dtype(storage: torch.dtype, low: int, high: int, ends: Any) -> None:
    p = Parts(storage)
    weight = decoded(p.program(p.data, [1, GROUP], p.scale, p.zero, storage, *ends))
    assert (weight.quant_min, weight.quant_max, weight.storage_dtype) == (low, high, storage)


def test_range_with_one_end_has_the_other_end_of_the_dtype() -> None:
    p = Parts()
    weight = decoded(p.program(p.data, [1, GROUP], p.scale, p.zero, torch.int8, quant_max=7))
    assert (weight.quant_min, weight.quant_max) == (-128, 7)


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(-8, 7, 4), (0, 15, 4), (-4, 3, 3), (-7, 7, 4), (0, 1, 1), (-128, 127, 8), (-16, 15, 5)]
)
def test_bits_hold_the_range(low: int, high: int, bits: int) -> None:
    p = Parts()
    assert decoded(p.program(p.data, [1, GROUP], p.scale, None, torch.int8, low, high)).bits == bits


def test_weight_without_zero_points_has_two_sources() -> None:
    p = Parts(zeros=False)
    program, node = only(p.program(p.data, [1, GROUP], p.scale, None, torch.int8, -8, 7))
    weight = decode(program, node)
    assert weight.zero_point is None
    assert weight_values(program, weight).zero_point is None
    assert len(weight.sources) == 2


def test_keyword_arguments_decode_as_positional_ones() -> None:
    p, q = Parts(), Parts()
    named = p.program(
        input=p.data, block_size=[1, GROUP], scale=p.scale, zero_point=p.zero, input_dtype=torch.int8,
        quant_min=-8, quant_max=7, output_dtype=torch.float32,
    )  # fmt: skip
    placed = q.program(q.data, [1, GROUP], q.scale, q.zero, torch.int8, -8, 7, torch.float32)
    one, two = decoded(named), decoded(placed)
    different = {"data", "scale", "zero_point"}
    for field in dataclasses.fields(QuantizedWeight):
        if field.name in different:
            assert getattr(one, field.name).name == getattr(two, field.name).name
        else:
            assert getattr(one, field.name) == getattr(two, field.name)


def test_edge_form_decodes_to_the_same_weight() -> None:
    from executorch.exir import EdgeCompileConfig
    from executorch.exir.dialects._ops import ops
    from executorch.exir.verification.verifier import EXIREdgeDialectVerifier

    p = Parts()
    args = (p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    target = ops.edge.torchao.dequantize_affine.default
    node = p.sketch.raw(target, *args, val=torch.empty(N, K))
    verifier = EXIREdgeDialectVerifier(EdgeCompileConfig(_check_ir_validity=False), class_only=True)
    program, node = only(p.sketch.program(node, verifiers=[verifier]))
    assert node.target is target
    weight = decode(program, node)
    assert (weight.shape, weight.group_size, weight.bits) == ((N, K), GROUP, 4)


@pytest.mark.parametrize(
    ("block", "scheme", "scales"),
    [
        ([1, 64], "int4 per-axis", N),
        ([1, 32], "int4 group 32", 2 * N),
        ([16, 64], "int4 per-tensor", 1),
        ([4, 32], "int4 blocks of 4 x 32", 8),
    ],
)
def test_scheme_describes_the_blocks(block: list[int], scheme: str, scales: int) -> None:
    p = Parts()
    scale = p.sketch.buffer("s", torch.rand(scales))
    weight = decoded(p.program(p.data, block, scale, None, torch.int8, -8, 7))
    assert weight.scheme == scheme
    assert weight.group_size == block[1]


def test_constants_may_be_parameters_buffers_or_lifted_tensors() -> None:
    for kind in ("parameter", "buffer", "constant"):
        sketch = Sketch()
        data = getattr(sketch, kind)("q", torch.zeros(N, K, dtype=torch.int8))
        scale = getattr(sketch, kind)("s", torch.ones(N, 2))
        node = sketch.call(DEQUANTIZE, data, [1, GROUP], scale, None, torch.int8, -8, 7)
        assert decoded(sketch.program(sketch.call(aten.neg.default, node))).fqn == "q"


def test_subclass_and_plain_parameters_hold_the_same_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(K, N))
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, config)
    whole: Any = model[0].weight
    exported = torch.export.export(model, (torch.randn(2, K),))
    for form in (exported, exported.run_decompositions({})):
        program, node = only(form)
        weight = decode(program, node)
        parts = weight_values(program, weight)
        assert (weight.fqn, weight.scheme) == ("0.weight", "int4 group 32")
        assert torch.equal(parts.data, whole.qdata)
        assert torch.equal(parts.scale, whole.scale)
        assert parts.zero_point is not None
        assert torch.equal(parts.zero_point, whole.zero_point)
        assert has_data(program, weight)


def test_values_are_views_with_one_row_per_output() -> None:
    sketch = Sketch()
    q, s = torch.randint(-8, 8, (N, K), dtype=torch.int8), torch.rand(N * 2)
    data, scale = sketch.buffer("q", q), sketch.buffer("s", s)
    node = sketch.call(DEQUANTIZE, data, [1, GROUP], scale, None, torch.int8, -8, 7)
    program, node = only(sketch.program(sketch.call(aten.neg.default, node)))
    parts = weight_values(program, decode(program, node))
    assert parts.data.data_ptr() == q.data_ptr()
    assert torch.equal(parts.scale, s.view(N, 2))


# Other nodes: a miss with the reason, and no exception ----------------------------------------------------


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ([1, 0], "a block size of 0"),
        ([1, -32], "a block size of -32"),
        ([0, 32], "a block size of 0"),
        ([1, 48], "an axis of 64, which blocks of 48 do not divide"),
        ([1, 128], "an axis of 64, which blocks of 128 do not divide"),
        ([32], "blocks of [32] for a weight of shape [16, 64]"),
        ([1, 1, 32], "blocks of [1, 1, 32] for a weight of shape [16, 64]"),
        ([1, 16], "32 scales for 64 blocks"),
        ([1, 64], "32 scales for 16 blocks"),
    ],
)
def test_blocks_that_do_not_fit_the_weight_are_a_miss(block: list[int], found: str) -> None:
    p = Parts()
    assert_misses(p.program(p.data, block, p.scale, p.zero, torch.int8, -8, 7, raw=True), found, rule="linear_int4")


def test_zero_points_of_another_count_are_a_miss() -> None:
    p = Parts()
    zero = p.sketch.buffer("z", torch.zeros(N, dtype=torch.int8))
    program = p.program(p.data, [1, GROUP], p.scale, zero, torch.int8, -8, 7, raw=True)
    assert_misses(program, "16 zero points for 32 blocks", rule="linear_int4")


@pytest.mark.parametrize(("low", "high"), [(7, -8), (3, 3)])
def test_empty_range_is_a_miss(low: int, high: int) -> None:
    p = Parts()
    program = p.program(p.data, [1, GROUP], p.scale, p.zero, torch.int8, low, high, raw=True)
    assert_misses(program, f"a quantized range of {low}..{high}", rule="linear_int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_data_of_a_dtype_without_integers_is_a_miss(dtype: torch.dtype) -> None:
    p = Parts()
    data = p.sketch.buffer("f", torch.zeros(N, K).to(dtype))
    program = p.program(data, [1, GROUP], p.scale, p.zero, dtype, -8, 7, raw=True)
    assert_misses(program, f"quantized data of dtype {dtype}", rule="linear_int4")


def test_integers_of_dtype_uint4_are_a_miss() -> None:
    """torch.iinfo raises for uint4."""
    p = Parts()
    data = p.sketch.buffer("f", torch.empty(N, K, dtype=torch.uint4))
    program = p.program(data, [1, GROUP], p.scale, p.zero, torch.uint4, 0, 15, raw=True)
    _, report = ecp.rewrite(program, "cuda")
    assert [outcome.status for outcome in report.outcomes] == ["missed"]
    assert "uint4" in str(report.outcomes[0].reasons[0])


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_computed_part_of_a_weight_is_a_miss(part: str) -> None:
    p = Parts()
    parts = {"data": p.data, "scale": p.scale, "zero": p.zero}
    parts[part] = p.sketch.call(aten.neg.default, parts[part])
    program = p.program(parts["data"], [1, GROUP], parts["scale"], parts["zero"], torch.int8, -8, 7)
    what = {"data": "the quantized data", "scale": "the scale", "zero": "the zero point"}[part]
    assert_misses(program, f"{what} comes from aten.neg (neg_default), not straight from", rule="linear_int4")


@pytest.mark.parametrize("part", ["scale", "zero"])
def test_input_as_part_of_a_weight_is_a_miss(part: str) -> None:
    p = Parts()
    parts = {"scale": p.scale, "zero": p.zero}
    dtype = {"scale": torch.float32, "zero": torch.int8}[part]
    parts[part] = p.sketch.input("given", N, K // GROUP, dtype=dtype)
    program = p.program(p.data, [1, GROUP], parts["scale"], parts["zero"], torch.int8, -8, 7)
    assert_misses(program, "comes from placeholder (given)", rule="linear_int4")


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_part_mutated_in_place_is_a_miss(part: str) -> None:
    p = Parts()
    node = {"data": p.data, "scale": p.scale, "zero": p.zero}[part]
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    p.sketch.call(aten.mul_.Tensor, p.sketch.call(aten.view.default, node, [-1]), 2)
    assert_misses(p.reading(weight), f"b_w_{part}, which the program mutates while it runs", rule="linear_int4")


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_part_mutated_through_an_output_is_a_miss(part: str) -> None:
    p = Parts()
    node = {"data": p.data, "scale": p.scale, "zero": p.zero}[part]
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    y = p.sketch.call(aten.linear.default, p.sketch.input("x", 2, K), weight)
    assert node is not None
    program = p.sketch.program(y, writes={f"w.{part}": p.sketch.call(aten.mul.Tensor, node, 2)})
    assert_misses(program, f"b_w_{part}, which the program mutates while it runs", rule="linear_int4")


def test_weight_mutated_through_an_alias_is_a_miss() -> None:
    """Two buffers share one storage: a mutation of one changes the other."""
    p = Parts()
    alias = p.sketch.buffer("alias", p.sketch.state["w.data"])
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    p.sketch.call(aten.neg_.default, alias)
    assert_misses(p.reading(weight), "which the program mutates while it runs", rule="linear_int4", target="cpu")


# Weights without data -----------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("q", torch.zeros(N, K, dtype=torch.int8, device=device))
        self.register_buffer("s", torch.ones(N, 2, dtype=torch.bfloat16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.torchao.dequantize_affine(self.q, [1, 32], self.s, None, torch.int8, -8, 7, torch.bfloat16)
        return torch.nn.functional.linear(x, weight)


def test_meta_weights_are_missed() -> None:
    program = torch.export.export(Model("meta"), (torch.empty(2, K, device="meta", dtype=torch.bfloat16),))
    for target in ("cuda", "cpu", "xnnpack"):
        report = assert_misses(program, "meta or fake tensors", target=target)
        assert "export with real weights" in str(report)


def test_fake_weights_are_missed() -> None:
    with FakeTensorMode():
        model, x = Model("cpu"), torch.empty(2, K, dtype=torch.bfloat16)
        program = torch.export.export(model, (x,))
    for target in ("cuda", "cpu", "xnnpack"):
        assert_misses(program, "meta or fake tensors", target=target)


# quantized_decomposed: each form decodes to the weight that the operator itself computes ----------------------------

qd = torch.ops.quantized_decomposed
I8 = (-127, 127, torch.int8)


def parts(s: Sketch, count: int, point: int = 3) -> tuple[Node, Node, Node]:
    random = torch.Generator().manual_seed(0)
    data = torch.randint(-127, 128, (N, K), generator=random).to(torch.int8)
    points = torch.randint(-point, point + 1, (count,), generator=random)
    return s.buffer("q", data), s.buffer("s", torch.rand(count, generator=random)), s.buffer("z", points)


FORMS: dict[str, tuple[Callable[[Sketch], Node], tuple[int, int], str]] = {
    "per channel": (lambda s: s.call(qd.dequantize_per_channel.default, *parts(s, N), 0, *I8), (1, K), "int8 per-axis"),
    "per channel, no zeros": (
        lambda s: s.call(qd.dequantize_per_channel.default, *parts(s, N)[:2], None, 0, *I8), (1, K), "int8 per-axis",
    ),
    "per input channel": (
        lambda s: s.call(qd.dequantize_per_channel.default, *parts(s, K), 1, *I8), (N, 1), "int8 blocks of 16 x 1",
    ),
    "per group": (
        lambda s: s.call(qd.dequantize_per_channel_group.default, *parts(s, 2 * N), *I8, 32, torch.float32),
        (1, 32), "int8 group 32",
    ),
    "per tensor": (
        lambda s: s.call(qd.dequantize_per_tensor.default, parts(s, 1)[0], 0.25, 3, *I8), (N, K), "int8 per-tensor",
    ),
    "per tensor, by tensors": (
        lambda s: s.call(qd.dequantize_per_tensor.tensor, *parts(s, 1), *I8), (N, K), "int8 per-tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_decoded_pt2e_weight_is_what_the_operator_computes(form: str) -> None:
    make, block, scheme = FORMS[form]
    sketch = Sketch()
    weight_node = make(sketch)
    exported = sketch.program(sketch.call(aten.linear.default, sketch.input("x", 2, K), weight_node))
    program = Program(exported)
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    weight = decode(program, node)
    assert (weight.shape, weight.block_size, weight.scheme) == ((N, K), block, scheme)
    assert (weight.fqn, weight.quant_min, weight.quant_max) == ("q", -127, 127)
    found = weight_values(program, weight)
    points = 0 if found.zero_point is None else found.zero_point.double().repeat_interleave(block[1], 1)
    mine = (found.data.double() - points) * found.scale.double().repeat_interleave(block[1], 1)

    def value(argument: Any) -> Any:
        return program.constant(argument) if isinstance(argument, Node) else argument

    wanted = node.target(*map(value, node.args))
    assert wanted.dtype is weight.output_dtype
    torch.testing.assert_close(mine.float(), wanted, rtol=1e-6, atol=0)
    _, report = ecp.rewrite(exported, "cpu")
    assert len(report.outcomes) == 1


def test_decoder_rejects_an_input_and_an_unknown_operator() -> None:
    sketch = Sketch()
    q, s, z = sketch.input("q", N, K, dtype=torch.int8), *parts(sketch, N)[1:]
    program = Program(sketch.program(sketch.call(qd.dequantize_per_channel.default, q, s, z, 0, *I8)))
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    with pytest.raises(Unmet, match="the quantized data comes from placeholder"):
        decode(program, node)
    with pytest.raises(TypeError, match="calls no operator that dequantizes"):
        decode(program, next(iter(program.graph.nodes)))


def test_scales_that_contradict_the_axis_are_rejected() -> None:
    sketch = Sketch()
    q, s, z = parts(sketch, 5)
    node = sketch.raw(qd.dequantize_per_channel.default, q, s, z, 0, *I8, val=torch.empty(N, K))
    program = Program(sketch.program(node))
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    with pytest.raises(Unmet, match="5 scales for 16 blocks"):
        decode(program, node)
