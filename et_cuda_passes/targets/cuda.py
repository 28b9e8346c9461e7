"""cuda: ExecuTorch's CUDA backend and plain AOTInductor on CUDA."""

from dataclasses import replace

import torch

from et_cuda_passes.kernels.gpus import HOPPER
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.rules.attention import FuseAttentionTranspose, UnmaskedAttention
from et_cuda_passes.rules.embedding import EmbeddingInt4, EmbeddingInt8
from et_cuda_passes.rules.epilogue import FuseActivation, FuseAdd, FuseGate, FuseMultiply, RemoveLinearViews
from et_cuda_passes.rules.experts import BmmInt4, CountExperts, EinsumInt4, GroupedMmInt4, IndexedBmmInt4
from et_cuda_passes.rules.float_linear import LinearFloat4, LinearFloat8
from et_cuda_passes.rules.fused_linear import FusedLinearInt4
from et_cuda_passes.rules.linear import ConvInt4, ConvInt8, LinearInt4, LinearInt8
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import INT8, Target

_TRITON = Kernel(
    "triton",
    layout="mma_tiled",
    dtypes=(torch.bfloat16, torch.float16),
    group_sizes=(16, 32, 64, 128),
    in_multiple=16,
)
_EXPERTS = replace(_TRITON, group_sizes=(32, 64, 128), in_multiple=32)
_BYTES = Kernel(
    "triton",
    layout=INT8,
    dtypes=(torch.bfloat16, torch.float16),
    group_sizes=(16, 32, 64, 128, 256),
    in_multiple=16,
    per_row=True,
)

CUDA = Target(
    "cuda",
    "ExecuTorch CUDA delegate, or AOTInductor on CUDA",
    gpu=HOPPER,
    kernels={
        "int4_linear": (
            _TRITON,
            Kernel(
                "tinygemm",
                layout="tile_packed_to_4d",
                dtypes=(torch.bfloat16,),
                group_sizes=(32, 64, 128, 256),
                in_multiple=32,
                out_multiple=8,
                scale_dtype=torch.bfloat16,
            ),
        ),
        "int4_table": (_TRITON,),
        "int4_experts": (_EXPERTS,),
        "int4_indexed_experts": (_EXPERTS,),
        "float4_linear": (_TRITON,),
        "int8_linear": (_BYTES,),
        "float8_linear": (_BYTES,),
    },
    passes=lambda: [
        *restoring(),
        FusedLinearInt4(max_out_features=4096, max_together=4, leave_epilogues=True),
        # LinearInt4 rewrites the linears that are not fused. int4 is before int8: its constants are half as large.
        LinearInt4(),
        # Before int8, which holds 4-bit floats too.
        LinearFloat4(),
        LinearInt8(),
        LinearFloat8(),
        ConvInt4(),
        ConvInt8(),
        BmmInt4(),
        IndexedBmmInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        CountExperts(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        # These match the results of the rules above. The kernel multiplies and then adds; a gated layer, which contains
        # a product, is one kernel.
        RemoveLinearViews(),
        FuseActivation(),
        FuseGate(),
        FuseMultiply(),
        FuseAdd(),
        UnmaskedAttention(),
        FuseAttentionTranspose(),
    ],
)
