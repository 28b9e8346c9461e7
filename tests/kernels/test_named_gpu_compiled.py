"""The launches of every operator for a named GPU compile for it on this machine, and fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from et_cuda_passes.kernels.choose import Weight, buckets, tiling_for
from et_cuda_passes.kernels.gpus import GPUS, GpuArch, gpu_arch
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import ATTENTION, INT4_EXPERTS, INT4_LINEARS, INT8_LINEAR
from tests.kernels.compiled import SPILLED, arch_of, compiled, resources, tilings_of

pytestmark = pytest.mark.compiled

FEWER = [f"{gpu.name}:{gpu.processors // 3}" for gpu in GPUS.values()]
N, K, EXPERTS = 2048, 1024, 8


class Everything(nn.Module):
    """Each operator with tilings, for a named GPU."""

    def __init__(self, gpu: str, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.gpu, self.kinds = gpu, kinds
        words, scales = K // 8, mma_tiled.scale_row(K, 32)

        def hold(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="cuda"))

        hold("packed", N, words, dtype=torch.int32)
        hold("qparams", 1, N, scales)
        hold("bytes", N, K, dtype=torch.int8)
        hold("scale", N, K // 64)
        hold("stack", EXPERTS, N, words, dtype=torch.int32)
        hold("stack_qparams", 1, EXPERTS, N, scales)
        hold("ends", EXPERTS, dtype=torch.int32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """X [1, rows, K]."""
        experts, heads = INT4_EXPERTS["mma_tiled"], x.view(1, x.shape[1], K // 128, 128)
        calls: dict[str, Any] = {
            "int4": lambda: INT4_LINEARS["mma_tiled"].op(x, self.packed, self.qparams, None, 32, N, gpu=self.gpu),
            "int8": lambda: INT8_LINEAR(x, self.bytes, self.scale, None, None, 64, gpu=self.gpu),
            "bmm": lambda: experts.bmm(x, self.stack, self.stack_qparams, None, 32, N, gpu=self.gpu),
            "grouped": lambda: experts.grouped_mm(
                x.view(-1, K), self.stack, self.stack_qparams, self.ends, 32, N, gpu=self.gpu
            ),
            "attention": lambda: ATTENTION(heads, heads, heads, 0.1, [2, 2, 2, 2], gpu=self.gpu),
        }
        return tuple(calls[kind]() for kind in self.kinds)


ALL = ("int4", "int8", "bmm", "grouped", "attention")


def launched(gpu: str, rows: int | None, kinds: tuple[str, ...]) -> list[torch.fx.Node]:
    """The launches that AOTInductor gets from the operators."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = torch.empty(1, rows or 16, K, dtype=torch.bfloat16, device="meta")
    length = DimDynamic.DYNAMIC if rows is None else DimDynamic.STATIC
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, length, DimDynamic.STATIC])
    shape = mode.from_tensor(given, symbolic_context=sizes).shape
    with mode:
        module, x = Everything(gpu, kinds), torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    traced, _ = aot_export_module(module, (x,), trace_joint=False)
    return [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def check(nodes: list[torch.fx.Node], gpu: GpuArch, folder: Path) -> int:
    """Compile every distinct kernel for ``gpu``; returns their number."""
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    seen = set()
    for node in nodes:
        found = table.get_kernel(node.kwargs["kernel_idx"])
        # torch keeps numbers of warps and stages other than Triton's defaults in the configuration of an autotuner.
        function, (config,) = (found.fn, found.configs) if hasattr(found, "configs") else (found, (triton.Config({}),))
        constants = table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"]
        given = {name: value for name, value in constants.items() if name in compile_time(function)} | {"SALT": 1}
        key = f"{function.__name__} {config.num_warps} {config.num_stages} {sorted(given.items())}"
        if key in seen:
            continue
        seen.add(key)
        kernel = compiled(function, given, arch_of(gpu), config.num_warps, config.num_stages)
        assert kernel.metadata.shared <= gpu.program_memory, key
        assert resources(kernel, folder)["STACK"] <= (0 if gpu.wgmma else SPILLED), key
    return len(seen)


def compile_time(kernel: Any) -> set[str]:
    """The names of the kernel's compile-time constants."""
    return {parameter.name for parameter in kernel.params if parameter.is_constexpr}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", FEWER)
def test_linears_for_a_named_gpu_compile_and_fit(name: str, tmp_path: Path) -> None:
    assert check(launched(name, 333, ("int4", "int8")), gpu_arch(name), tmp_path) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [1, 24, 160, 2048, None])
@pytest.mark.parametrize("name", [*GPUS, *FEWER])
def test_operators_for_a_named_gpu_compile_and_fit(name: str, rows: int | None, tmp_path: Path) -> None:
    assert check(launched(name, rows, ALL), gpu_arch(name), tmp_path) >= len(ALL) - 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", GPUS)
def test_choice_for_any_number_of_multiprocessors_is_among_the_compiled_tilings(name: str, bits: int) -> None:
    """The slow tests of each kernel compile all of ``tilings_of``."""
    forms = [(False, False), (True, False), (True, True)] if bits == 4 else [(False, False)]
    for experts, grouped in forms:
        known = set(tilings_of(GPUS[name], bits, experts=experts, grouped=grouped))
        for processors in (1, 7, GPUS[name].processors // 2, 2 * GPUS[name].processors):
            gpu = gpu_arch(f"{name}:{processors}")
            for n, k in ((512, 576), (4096, 4096), (151936, 1056)):
                weight = Weight(n, k, 32, bits, batch=8 if experts else 1, experts=experts, grouped=grouped)
                chosen = {*buckets(gpu, weight).tilings.values(), *(tiling_for(gpu, weight, m) for m in (1, 160, 2048))}
                assert {replace(tiling, waves=min(tiling.waves, 1)) for tiling in chosen} <= known, (processors, n, k)
