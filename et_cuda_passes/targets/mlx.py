"""mlx: ExecuTorch's MLX delegate. Weights that its kernels read stay; every other dequantize is folded."""

import torch

from et_cuda_passes.rules.fold import DropActivationQuantization, FoldDequantize
from et_cuda_passes.rules.mlx import KeepMlxForm, KeepMlxWeight
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import Target

MLX = Target(
    "mlx",
    "ExecuTorch MLX delegate",
    kernels={},
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    passes=lambda: [KeepMlxForm(), *restoring(), DropActivationQuantization(), KeepMlxWeight(), FoldDequantize()],
)
