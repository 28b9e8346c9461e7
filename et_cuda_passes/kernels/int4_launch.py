"""Which kernels compute an int4 linear, and their launches.

A number of rows that is known picks its kernel now. One that is not is a branch at run time: every bucket of rows is
a launch whose grid is multiplied by 0 or 1, and a grid of no programs is skipped. Comparing the length in Python would
fix it, and a branch of the graph would cost its own synchronisation.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor

from et_cuda_passes.kernels.choose import Weight
from et_cuda_passes.kernels.int4_matmul import int4_matmul
from et_cuda_passes.kernels.launching import gpu_of, in_blocks, over_buckets, possible, product, wave
from et_cuda_passes.kernels.tiling import Tiling

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Epilogue:
    """What follows the product, in this order; each is left out where it is None.

    Attributes:
        bias: [N].
        activation: one of :data:`~et_cuda_passes.kernels.epilogue.ACTIVATIONS`.
        factor: [..., N], multiplied.
        addend: [..., N], added.
        gated: whether the weight has 2 N rows, of every 16 the first eight a gate's and the others what it is
            multiplied by: the bias is [2 N] then, and ``activation`` the gate's.
    """

    bias: Tensor | None = None
    activation: str = ""
    factor: Tensor | None = None
    addend: Tensor | None = None
    gated: bool = False


def int4_linear(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, epilogue: Epilogue) -> Tensor:
    """``x [..., K] @ weight.T`` and its epilogue on CUDA, [..., N]: all contiguous, the weight in the mma_tiled layout.

    The tensors are used in the shape that they have: of a view, Inductor would write a copy for every launch.
    """
    m, k, n = math.prod(x.shape[:-1]), x.shape[-1], packed.shape[0]
    gpu = gpu_of(x.device)
    tensors = 1 + (epilogue.factor is not None) + (epilogue.addend is not None)
    weight = Weight(n, k, group_size, outputs=tensors / 2 if epilogue.gated else tensors)

    def one(y: Tensor, parts: Tensor | None, tiling: Tiling, flag: int | SymInt) -> tuple[Tensor, Tensor | None]:
        return launch(x, m, packed, qparams, epilogue, y, parts, group_size, tiling, flag, gpu.wgmma, gpu.processors)

    return over_buckets(x, n // 2 if epilogue.gated else n, possible(m, weight, gpu), gpu.processors, one)


def launch(
    x: Tensor,
    m: int | SymInt,
    packed: Tensor,
    qparams: Tensor,
    epilogue: Epilogue,
    y: Tensor,
    parts: Tensor | None,
    group_size: int,
    tiling: Tiling,
    flag: int | SymInt,
    wgmma: bool,
    processors: int,
) -> tuple[Tensor, Tensor | None]:
    """Launch one tiling over a grid multiplied by ``flag``, 0 or 1; ``parts`` is fp32, as many as cut tiles need.

    Returns:
        y and parts, as they are then.
    """
    k, n = x.shape[-1], packed.shape[0]
    programs = wave(tiling, m, n, packed.shape[1] * 8, processors)
    # A pointer that is not read still has to be one.
    given = {"bias_ptr": epilogue.bias, "factor_ptr": epilogue.factor, "addend_ptr": epilogue.addend}
    common: dict[str, Any] = {name: qparams if tensor is None else tensor for name, tensor in given.items()}
    common |= {"HAS_BIAS": epilogue.bias is not None, "HAS_FACTOR": epilogue.factor is not None}
    common |= {"HAS_ADDEND": epilogue.addend is not None, "ACTIVATION": epilogue.activation, "USE_ASM": True}
    common |= {"GATED": epilogue.gated}
    common |= {"M": m, "N": n, "K32": k // 32}
    common |= {"BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k, "SLOTS": programs.slots}
    described = in_blocks(x, tiling, tiling.block_m)
    extra = in_blocks(x, tiling, tiling.extra_m) if tiling.extra_m else None
    arguments = {
        **common,
        "x_ptr": described or x,
        "extra_ptr": extra or x,
        "BLOCK_M": tiling.block_m,
        "EXTRA_M": tiling.extra_m,
        "BULK": 0 if described is None else x.dim(),
        "words_ptr": packed,
        "qparams_ptr": qparams,
        "SEGMENTS": tiling.segments,
        "GROUP_SIZE": group_size,
        # Words and scales are padded to whole steps of a bulk copy, and it reads zeros for the x that is not there.
        "EVEN_K": described is not None or k % (tiling.block_k * tiling.segments) == 0,
        "HAS_ZERO": qparams.shape[0] == 2,
        "WGMMA": wgmma,
    }
    return product(int4_matmul, y, parts, tiling, programs, flag, arguments, common, f"{m} {n} {k}")
