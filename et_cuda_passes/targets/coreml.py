"""coreml: ExecuTorch's Core ML delegate. Weights that it stores compressed stay; every other dequantize is folded."""

import torch

from et_cuda_passes.quant.unsupported import SuggestedSchemes
from et_cuda_passes.rules.coreml import KeepCoremlWeight
from et_cuda_passes.rules.fold import DropActivationQuantization, FoldDequantize
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import Target

COREML = Target(
    "coreml",
    "ExecuTorch Core ML delegate",
    kernels={},
    advised=SuggestedSchemes(),
    dtypes=(torch.float32, torch.float16),
    refuses_misses=True,
    passes=lambda: [*restoring(), DropActivationQuantization(), KeepCoremlWeight(), FoldDequantize()],
)
