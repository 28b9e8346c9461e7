"""cpu: plain AOTInductor on the CPU. What is packed runs on hosts of the packing host's instruction set only."""

import torch

from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.kernels.int8 import PLAIN, Int8Kernel
from et_cuda_passes.rules.bmm_int4 import BmmInt4
from et_cuda_passes.rules.chosen_experts_int4 import ChosenExpertsInt4
from et_cuda_passes.rules.conv_int4 import ConvInt4
from et_cuda_passes.rules.conv_int8 import ConvInt8
from et_cuda_passes.rules.einsum_int4 import EinsumInt4
from et_cuda_passes.rules.embedding_int4 import EmbeddingInt4
from et_cuda_passes.rules.embedding_int8 import EmbeddingInt8
from et_cuda_passes.rules.grouped_mm_int4 import GroupedMmInt4
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.linear_int8 import LinearInt8
from et_cuda_passes.rules.linear_views import LinearViews
from et_cuda_passes.targets.target import Target

_INT4PACK = Int4Kernel(
    "int4pack_cpu",
    layout="cpu",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    group_sizes=(32, 64, 128, 256),
    in_multiple=32,
    out_multiple=16,
    # Inductor gives the kernel its group size as a constant of the branch, which the code it writes then lacks.
    in_control_flow=False,
)

CPU = Target(
    "cpu",
    "AOTInductor on the CPU",
    int4_kernels=(_INT4PACK,),
    int4_experts=_INT4PACK,
    # What a tensor chooses can be read where each weight's place is known.
    int4_chosen_experts=Int4Kernel(
        "rows",
        layout="mma_tiled",
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        group_sizes=(32, 64, 128),
        in_multiple=32,
        out_multiple=1,
    ),
    int8_kernels=(Int8Kernel("int8pack_cpu", dtypes=(torch.bfloat16, torch.float16, torch.float32), in_multiple=16),),
    int8_plain=PLAIN,
    # The linear's own layout depends on the instruction set, and cannot be read row by row.
    int4_table=Int4Kernel(
        "rows",
        layout="mps",
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        group_sizes=(32, 64, 128, 256),
        in_multiple=32,
        out_multiple=8,
    ),
    passes=lambda: [
        LinearInt4(),
        LinearInt8(),
        ConvInt4(),
        ConvInt8(),
        BmmInt4(),
        ChosenExpertsInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        LinearViews(),
    ],
)
