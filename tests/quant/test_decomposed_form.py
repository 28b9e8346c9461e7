"""quantized_decomposed.dequantize_*: each form decodes to the weight that the operator itself computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.affine import decode, weight_values
from et_cuda_passes.quant.forms import is_dequantize
from tests.helpers import Sketch

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
N, K = 16, 64
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
def test_the_weight_is_what_the_operator_computes(form: str) -> None:
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


def test_what_is_no_constant_says_so() -> None:
    sketch = Sketch()
    q, s, z = sketch.input("q", N, K, dtype=torch.int8), *parts(sketch, N)[1:]
    program = Program(sketch.program(sketch.call(qd.dequantize_per_channel.default, q, s, z, 0, *I8)))
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    with pytest.raises(Unmet, match="the quantized data comes from placeholder"):
        decode(program, node)
    with pytest.raises(TypeError, match="calls no operator that dequantizes"):
        decode(program, next(iter(program.graph.nodes)))


def test_scales_that_contradict_the_axis() -> None:
    sketch = Sketch()
    q, s, z = parts(sketch, 5)
    node = sketch.raw(qd.dequantize_per_channel.default, q, s, z, 0, *I8, val=torch.empty(N, K))
    program = Program(sketch.program(node))
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    with pytest.raises(Unmet, match="5 scales for 16 blocks"):
        decode(program, node)
