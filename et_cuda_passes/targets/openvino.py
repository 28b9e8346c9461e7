"""openvino: ExecuTorch's OpenVINO delegate. Each dequantize becomes arithmetic that OpenVINO keeps compressed."""

import torch

from et_cuda_passes.quant.unsupported import SuggestedSchemes
from et_cuda_passes.rules.fold import DropActivationQuantization, FoldDequantize
from et_cuda_passes.rules.openvino import DecompressInt4, DecompressInt8
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import Target

OPENVINO = Target(
    "openvino",
    "ExecuTorch OpenVINO delegate",
    kernels={},
    advised=SuggestedSchemes(),
    dtypes=(torch.float32, torch.float16),
    # ExecuTorch 1.5.1's runtime returns outputs of the largest size for every input.
    dynamic_sizes=False,
    refuses_misses=True,
    passes=lambda: [*restoring(), DropActivationQuantization(), DecompressInt4(), DecompressInt8(), FoldDequantize()],
)
