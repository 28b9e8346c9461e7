"""tensorrt: torch-tensorrt. Symmetric weights in its two schemes stay; every other dequantize is folded."""

import torch

from et_cuda_passes.rules.fold import DropActivationQuantization, FoldDequantize
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.rules.tensorrt import KeepTensorrtWeight
from et_cuda_passes.targets.target import Target

TENSORRT = Target(
    "tensorrt",
    "torch-tensorrt",
    kernels={},
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    passes=lambda: [*restoring(), DropActivationQuantization(), KeepTensorrtWeight(), FoldDequantize()],
)
