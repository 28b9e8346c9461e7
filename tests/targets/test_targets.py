"""Targets as data: names, pass lists, what a kernel can take."""

import dataclasses

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.ops import INT4_LINEARS
from et_cuda_passes.targets import get_target


def test_the_targets() -> None:
    assert ecp.targets() == ("cuda", "metal", "xnnpack", "cpu")


@pytest.mark.parametrize("unknown", ["CUDA", "tensorrt", "", None, 3])
@pytest.mark.parametrize("ask", [get_target, ecp.default_passes])
def test_an_unknown_target_lists_those_that_there_are(ask: object, unknown: object) -> None:
    with pytest.raises(ValueError, match=r"unknown target .*; known targets are cuda, metal, xnnpack, cpu"):
        ask(unknown)  # type: ignore[operator]


def test_a_target_stands_for_itself() -> None:
    cuda = get_target("cuda")
    assert get_target(cuda) is cuda
    assert [p.name for p in ecp.default_passes(cuda)] == [p.name for p in ecp.default_passes("cuda")]


@pytest.mark.parametrize("name", ecp.targets())
def test_a_pass_list_is_the_caller_s_own(name: str) -> None:
    first = ecp.default_passes(name)
    assert isinstance(first, list)
    assert all(isinstance(entry, ecp.Rule) for entry in first)
    wanted = [entry.name for entry in first]
    assert len(set(wanted)) == len(wanted) > 0
    first.clear()
    assert [entry.name for entry in ecp.default_passes(name)] == wanted


@pytest.mark.parametrize("name", ecp.targets())
def test_a_target_cannot_be_changed(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_target(name).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ecp.targets())
def test_every_kernel_has_an_operator_and_sensible_abilities(name: str) -> None:
    kernels = get_target(name).int4_kernels
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert kernel.layout in INT4_LINEARS
        assert torch.bfloat16 in kernel.dtypes
        assert all(kernel.in_multiple <= size and size % kernel.in_multiple == 0 for size in kernel.group_sizes)


def test_what_each_target_runs() -> None:
    assert [k.name for k in get_target("cuda").int4_kernels] == ["triton", "tinygemm"]
    assert [k.name for k in get_target("metal").int4_kernels] == ["torchao", "mps"]
    assert [k.name for k in get_target("cpu").int4_kernels] == ["int4pack_cpu"]
    assert get_target("xnnpack").int4_kernels == ()
    assert [k.name for k in get_target("cpu").int8_kernels] == ["int8pack_cpu"]
    assert [k.name for k in get_target("cuda").int8_kernels] == ["triton"]
    assert get_target("metal").int8_kernels == ()
    assert get_target("metal").int4_experts is None
    for name in ("cuda", "cpu"):
        assert get_target(name).int4_experts is get_target(name).int4_kernels[0]
    # What a table tied to a linear is packed as.
    for name in ("cuda", "metal"):
        assert get_target(name).int4_table is get_target(name).int4_kernels[0]


def test_a_target_of_one_s_own_is_accepted_everywhere() -> None:
    from tests.helpers import Sketch

    own = dataclasses.replace(get_target("cuda"), name="mine", passes=lambda: [ecp.LinearInt4()])
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    program = sketch.program(sketch.call(torch.ops.aten.linear.default, x, sketch.weight("w")))
    _, report = ecp.rewrite(program, own, expect={"linear_int4": 1})
    assert (report.target, report.passes) == ("mine", ["linear_int4"])
    assert str(report).startswith("mine: 1 candidate")


@pytest.mark.parametrize("where", ["int4_kernels", "int4_table", "int4_experts", "int4_chosen_experts"])
def test_a_layout_that_nothing_reads_is_refused_where_the_target_is_made(where: str) -> None:
    cpu = get_target("cpu")
    odd = dataclasses.replace(cpu.int4_kernels[0], name="mine", layout="my_layout")
    with pytest.raises(ValueError, match=r"kernel 'mine' reads the layout 'my_layout', .*; known are .*mma_tiled"):
        dataclasses.replace(cpu, **{where: (odd,) if where == "int4_kernels" else odd})
