"""The one decoder of dequantize_affine: every argument form gives the same weight; what is no weight says so."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.affine import QuantizedWeight, decode, has_data, weight_values
from et_cuda_passes.testing import assert_misses
from tests.helpers import DEQUANTIZE, Sketch

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
        """linear(x, target(*args, **kwargs)); ``raw`` for arguments that the operator itself refuses."""
        build, extra = (self.sketch.raw, {"val": torch.empty(N, K)}) if raw else (self.sketch.call, {})
        return self.reading(build(target, *args, **kwargs, **extra))

    def reading(self, weight: Node) -> torch.export.ExportedProgram:
        return self.sketch.program(self.sketch.call(aten.linear.default, self.sketch.input("x", 2, K), weight))


# Argument forms ----------------------------------------------------------------------------------------------------


def test_a_weight_is_what_its_node_says() -> None:
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
def test_the_output_dtype_may_be_by_position_by_name_or_left_out(dtype: torch.dtype) -> None:
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
def test_a_range_that_is_not_given_is_that_of_the_storage(storage: torch.dtype, low: int, high: int, ends: Any) -> None:
    p = Parts(storage)
    weight = decoded(p.program(p.data, [1, GROUP], p.scale, p.zero, storage, *ends))
    assert (weight.quant_min, weight.quant_max, weight.storage_dtype) == (low, high, storage)


def test_one_end_of_the_range_may_be_given() -> None:
    p = Parts()
    weight = decoded(p.program(p.data, [1, GROUP], p.scale, p.zero, torch.int8, quant_max=7))
    assert (weight.quant_min, weight.quant_max) == (-128, 7)


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(-8, 7, 4), (0, 15, 4), (-4, 3, 3), (-7, 7, 4), (0, 1, 1), (-128, 127, 8), (-16, 15, 5)]
)
def test_bits_hold_the_range(low: int, high: int, bits: int) -> None:
    p = Parts()
    assert decoded(p.program(p.data, [1, GROUP], p.scale, None, torch.int8, low, high)).bits == bits


def test_without_zero_points() -> None:
    p = Parts(zeros=False)
    program, node = only(p.program(p.data, [1, GROUP], p.scale, None, torch.int8, -8, 7))
    weight = decode(program, node)
    assert weight.zero_point is None
    assert weight_values(program, weight).zero_point is None
    assert len(weight.sources) == 2


def test_everything_by_name() -> None:
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


def test_the_edge_form_is_the_same_weight() -> None:
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
def test_schemes_in_words(block: list[int], scheme: str, scales: int) -> None:
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


def test_values_are_views_by_row() -> None:
    sketch = Sketch()
    q, s = torch.randint(-8, 8, (N, K), dtype=torch.int8), torch.rand(N * 2)
    data, scale = sketch.buffer("q", q), sketch.buffer("s", s)
    node = sketch.call(DEQUANTIZE, data, [1, GROUP], scale, None, torch.int8, -8, 7)
    program, node = only(sketch.program(sketch.call(aten.neg.default, node)))
    parts = weight_values(program, decode(program, node))
    assert parts.data.data_ptr() == q.data_ptr()
    assert torch.equal(parts.scale, s.view(N, 2))


# What is no weight: a miss that says why, and never an exception ----------------------------------------------------


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
def test_blocks_that_do_not_fit_the_weight(block: list[int], found: str) -> None:
    p = Parts()
    assert_misses(p.program(p.data, block, p.scale, p.zero, torch.int8, -8, 7, raw=True), found, rule="linear_int4")


def test_zero_points_of_another_count() -> None:
    p = Parts()
    zero = p.sketch.buffer("z", torch.zeros(N, dtype=torch.int8))
    program = p.program(p.data, [1, GROUP], p.scale, zero, torch.int8, -8, 7, raw=True)
    assert_misses(program, "16 zero points for 32 blocks", rule="linear_int4")


@pytest.mark.parametrize(("low", "high"), [(7, -8), (3, 3)])
def test_a_range_that_holds_nothing(low: int, high: int) -> None:
    p = Parts()
    program = p.program(p.data, [1, GROUP], p.scale, p.zero, torch.int8, low, high, raw=True)
    assert_misses(program, f"a quantized range of {low}..{high}", rule="linear_int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_data_that_are_no_integers(dtype: torch.dtype) -> None:
    p = Parts()
    data = p.sketch.buffer("f", torch.zeros(N, K).to(dtype))
    program = p.program(data, [1, GROUP], p.scale, p.zero, dtype, -8, 7, raw=True)
    assert_misses(program, f"quantized data of dtype {dtype}", rule="linear_int4")


def test_integers_of_a_dtype_that_torch_only_names() -> None:
    """torch.iinfo knows no uint4."""
    p = Parts()
    data = p.sketch.buffer("f", torch.empty(N, K, dtype=torch.uint4))
    program = p.program(data, [1, GROUP], p.scale, p.zero, torch.uint4, 0, 15, raw=True)
    _, report = ecp.rewrite(program, "cuda")
    assert [outcome.status for outcome in report.outcomes] == ["missed"]
    assert "uint4" in str(report.outcomes[0].reasons[0])


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_a_part_that_is_computed(part: str) -> None:
    p = Parts()
    parts = {"data": p.data, "scale": p.scale, "zero": p.zero}
    parts[part] = p.sketch.call(aten.neg.default, parts[part])
    program = p.program(parts["data"], [1, GROUP], parts["scale"], parts["zero"], torch.int8, -8, 7)
    what = {"data": "the quantized data", "scale": "the scale", "zero": "the zero point"}[part]
    assert_misses(program, f"{what} comes from aten.neg (neg_default), not straight from", rule="linear_int4")


@pytest.mark.parametrize("part", ["scale", "zero"])
def test_a_part_that_is_an_input(part: str) -> None:
    p = Parts()
    parts = {"scale": p.scale, "zero": p.zero}
    dtype = {"scale": torch.float32, "zero": torch.int8}[part]
    parts[part] = p.sketch.input("given", N, K // GROUP, dtype=dtype)
    program = p.program(p.data, [1, GROUP], parts["scale"], parts["zero"], torch.int8, -8, 7)
    assert_misses(program, "comes from placeholder (given)", rule="linear_int4")


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_a_part_that_the_program_writes_in_place(part: str) -> None:
    p = Parts()
    node = {"data": p.data, "scale": p.scale, "zero": p.zero}[part]
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    p.sketch.call(aten.mul_.Tensor, p.sketch.call(aten.view.default, node, [-1]), 2)
    assert_misses(p.reading(weight), f"b_w_{part}, which the program writes while it runs", rule="linear_int4")


@pytest.mark.parametrize("part", ["data", "scale", "zero"])
def test_a_part_that_the_program_writes_functionally(part: str) -> None:
    p = Parts()
    node = {"data": p.data, "scale": p.scale, "zero": p.zero}[part]
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    y = p.sketch.call(aten.linear.default, p.sketch.input("x", 2, K), weight)
    assert node is not None
    program = p.sketch.program(y, writes={f"w.{part}": p.sketch.call(aten.mul.Tensor, node, 2)})
    assert_misses(program, f"b_w_{part}, which the program writes while it runs", rule="linear_int4")


def test_a_weight_written_under_another_name_of_its_storage() -> None:
    """Two buffers over one storage: what is written under one name changes under the other."""
    p = Parts()
    alias = p.sketch.buffer("alias", p.sketch.state["w.data"])
    weight = p.sketch.call(DEQUANTIZE, p.data, [1, GROUP], p.scale, p.zero, torch.int8, -8, 7)
    p.sketch.call(aten.neg_.default, alias)
    assert_misses(p.reading(weight), "which the program writes while it runs", rule="linear_int4", target="cpu")


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
