"""cpu: plain AOTInductor on the CPU. What is packed runs on hosts of the packing host's instruction set only."""

import torch

from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.linear_views import LinearViews
from et_cuda_passes.targets.target import Target

CPU = Target(
    "cpu",
    "AOTInductor on the CPU",
    int4_kernels=(
        Int4Kernel(
            "int4pack_cpu",
            layout="cpu",
            dtypes=(torch.bfloat16, torch.float16, torch.float32),
            group_sizes=(32, 64, 128, 256),
            in_multiple=32,
            out_multiple=16,
            # Inductor gives the kernel its group size as a constant of the branch, which the code it writes then lacks.
            in_control_flow=False,
        ),
    ),
    passes=lambda: [LinearInt4(), LinearViews()],
)
