"""Targets as data: names, lists of rules, and kernels by family."""

import dataclasses

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.targets import get_target
from et_cuda_passes.targets.target import FAMILIES


def test_targets_lists_all_names() -> None:
    assert ecp.targets() == (
        "cuda", "metal", "xnnpack", "cpu", "vulkan", "coreml", "openvino", "mlx", "tensorrt",
    )  # fmt: skip


@pytest.mark.parametrize("unknown", ["CUDA", "tpu", "", None, 3])
@pytest.mark.parametrize("ask", [get_target, ecp.default_passes])
def test_get_target_lists_known_targets_for_unknown_name(ask: object, unknown: object) -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown target .*; known targets are cuda, metal, xnnpack, cpu, vulkan",
    ):
        ask(unknown)  # type: ignore[operator]


def test_get_target_refuses_several_names() -> None:
    with pytest.raises(ValueError, match="'vulkan,mlx' names several targets, and one is needed"):
        get_target("vulkan,mlx")


def test_get_target_returns_target_as_it_is() -> None:
    cuda = get_target("cuda")
    assert get_target(cuda) is cuda
    assert [p.name for p in ecp.default_passes(cuda)] == [p.name for p in ecp.default_passes("cuda")]


@pytest.mark.parametrize("name", ecp.targets())
def test_default_passes_returns_new_list(name: str) -> None:
    first = ecp.default_passes(name)
    assert isinstance(first, list)
    assert all(isinstance(entry, ecp.Rule) for entry in first)
    wanted = [entry.name for entry in first]
    assert len(set(wanted)) == len(wanted) > 0
    first.clear()
    assert [entry.name for entry in ecp.default_passes(name)] == wanted


@pytest.mark.parametrize("name", ecp.targets())
def test_target_is_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_target(name).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ecp.targets())
def test_kernels_have_operators_and_consistent_abilities(name: str) -> None:
    for family, kernels in get_target(name).kernels.items():
        assert len({kernel.name for kernel in kernels}) == len(kernels) > 0
        for kernel in kernels:
            assert kernel.layout in FAMILIES[family]
            assert torch.bfloat16 in kernel.dtypes
            assert all(size % kernel.in_multiple == 0 for size in kernel.group_sizes)


def test_targets_have_expected_kernels() -> None:
    names = {
        name: {family: [kernel.name for kernel in kernels] for family, kernels in get_target(name).kernels.items()}
        for name in ecp.targets()
    }
    assert names == {
        "cuda": {
            "int4_linear": ["triton", "tinygemm"],
            "int4_table": ["triton"],
            "int4_experts": ["triton"],
            "int4_indexed_experts": ["triton"],
            "float4_linear": ["triton"],
            "int8_linear": ["triton"],
            "float8_linear": ["triton"],
        },
        "metal": {"int4_linear": ["torchao", "mps"], "int4_table": ["torchao"], "int8_plain": ["plain operators"]},
        "xnnpack": {},
        "cpu": {
            "int4_linear": ["int4pack_cpu", "plain operators"],
            "int4_table": ["rows"],
            "int4_experts": ["int4pack_cpu"],
            "int4_indexed_experts": ["rows"],
            "int8_linear": ["int8pack_cpu"],
            "int8_plain": ["plain operators"],
            "int4_plain": ["plain operators"],
        },
        **{name: {} for name in ("vulkan", "coreml", "openvino", "mlx", "tensorrt")},
    }
    for name, family in (("cuda", "float4_linear"), ("cpu", "int4_experts"), ("cuda", "int4_table")):
        assert get_target(name).kernel(family) is get_target(name).kernel("int4_linear")
    # A table tied to a linear is stored once for both.
    assert get_target("metal").kernel("int4_table") is get_target("metal").kernel("int4_linear")


def test_kernel_finds_default_and_name() -> None:
    cuda = get_target("cuda")
    assert cuda.kernel("int4_linear") is cuda.kernels["int4_linear"][0]
    assert cuda.kernel("int4_linear", "tinygemm") is cuda.kernels["int4_linear"][1]
    assert get_target("xnnpack").kernel("int4_linear") is None
    with pytest.raises(ValueError, match="target cuda has no int4 kernel 'mps'; it has: triton, tinygemm"):
        cuda.kernel("int4_linear", "mps")
    with pytest.raises(ValueError, match="target metal has no int8 kernel 'mine'; it has: none"):
        get_target("metal").kernel("int8_linear", "mine")


@pytest.mark.parametrize(
    ("group_size", "in_features", "per_row", "native"),
    [(64, 128, False, 64), (192, 384, False, 64), (16, 64, False, None), (48, 48, False, None), (48, 48, True, 48)],
)
def test_native_group_size_divides_group_size(
    group_size: int, in_features: int, per_row: bool, native: int | None
) -> None:
    kernel = ecp.Kernel("mine", "mps", (torch.float32,), (32, 64), per_row=per_row)
    assert kernel.native_group_size(group_size, in_features) == native


def test_old_name_of_kernel_names_new_one() -> None:
    with pytest.raises(AttributeError, match="Int4Kernel is now et_cuda_passes.Kernel"):
        ecp.Int4Kernel  # type: ignore[attr-defined]  # noqa: B018


def test_rewrite_accepts_custom_target() -> None:
    from et_cuda_passes.testing import Sketch

    own = dataclasses.replace(get_target("cuda"), name="mine", passes=lambda: [ecp.LinearInt4()])
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    program = sketch.program(sketch.call(torch.ops.aten.linear.default, x, sketch.weight("w")))
    _, report = ecp.rewrite(program, own, expect={"linear_int4": 1})
    assert (report.target, report.passes) == ("mine", ["linear_int4"])
    assert str(report).startswith("mine: 1 candidate")


@pytest.mark.parametrize("family", FAMILIES)
def test_target_rejects_layout_without_operator(family: str) -> None:
    odd = ecp.Kernel("mine", "my_layout", (torch.float32,))
    known = "mma_tiled" if "4" in family else "int8"
    with pytest.raises(ValueError, match=rf"kernel 'mine' reads the layout 'my_layout', .*; known are .*{known}"):
        dataclasses.replace(get_target("cpu"), kernels={family: (odd,)})


def test_target_rejects_unknown_family() -> None:
    with pytest.raises(ValueError, match="there is no family of kernels 'int4'; known are int4_linear, "):
        dataclasses.replace(get_target("cpu"), kernels={"int4": ()})


def test_passes_that_are_no_function_are_refused() -> None:
    with pytest.raises(TypeError, match=r"passes must be a function .* write passes=lambda: \[\.\.\.\]"):
        ecp.Target("npu", "An accelerator", kernels={}, passes=[])  # type: ignore[arg-type]


KERNEL = ecp.Kernel("mine", "mps", (torch.float32,), (32,), in_multiple=32, out_multiple=8)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"group_sizes": 32}, r"group_sizes must be a tuple such as \(32, 64\), not 32"),
        ({"group_sizes": ("32",)}, "group_sizes must be a tuple"),
        ({"group_sizes": (0,)}, "group_sizes has 0; write a number of at least 1"),
        ({"in_multiple": 0}, "in_multiple has 0"),
        ({"dtypes": ("float32",)}, r"dtypes must be a tuple such as \(torch.float16,\)"),
    ],
)
def test_kernel_with_impossible_abilities_is_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"kernel 'mine': {error}"):
        dataclasses.replace(KERNEL, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernels", "error"),
    [
        ([KERNEL], "kernels must be a mapping from families to tuples of Kernel"),
        ({"int4_linear": KERNEL}, "kernels must be a mapping from families to tuples of Kernel"),
        ({"int4_linear": (KERNEL, KERNEL)}, r"two int4_linear kernels have one name \(mine, mine\)"),
        ({"int4_table": (dataclasses.replace(KERNEL, out_multiple=1),)}, "multiple of 8: write out_multiple=8"),
        ({"int4_table": (dataclasses.replace(KERNEL, in_multiple=48),)}, "multiple of 32: write in_multiple=64"),
    ],
)
def test_target_with_impossible_kernels_is_refused(kernels: object, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        ecp.Target("npu", "An accelerator", kernels=kernels, passes=list)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["my npu", "a,b", "../npu", "", "my:npu", "1npu"])
def test_name_of_a_target_that_no_command_line_accepts_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a target cannot be named"):
        ecp.Target(name, "An accelerator", kernels={}, passes=list)


def test_passes_of_a_target_that_fail_name_the_target() -> None:
    for passes, error in ((lambda: 1 / 0, "ZeroDivisionError"), (lambda: None, "it returned None")):
        npu = ecp.Target("npu", "An accelerator", kernels={}, passes=passes)  # type: ignore[arg-type, return-value]
        with pytest.raises(ValueError, match=f"target 'npu': .*{error}"):
            ecp.default_passes(npu)


def test_hint_names_bf16_only_if_the_kernel_has_it() -> None:
    from et_cuda_passes.testing import embedding, linear

    kernels = {"int4_linear": (KERNEL,), "int4_table": (KERNEL,)}
    npu = ecp.Target("npu", "An accelerator", kernels, lambda: [ecp.LinearInt4(), ecp.EmbeddingInt4()])
    for program in (linear(), embedding("4w", 32)):
        _, report = ecp.rewrite(program, npu, expect={"missed": 1})
        assert "found bfloat16" in str(report) and "export the model in" in str(report)
        assert "cast_to_bf16" not in str(report) and "in bfloat16" not in str(report)
    cast = [ecp.LinearInt4(cast_to_bf16=True)]
    ecp.rewrite(linear(), npu, passes=cast, expect={"missed": 1})
