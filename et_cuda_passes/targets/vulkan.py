"""vulkan: ExecuTorch's Vulkan delegate. 4-bit weights that its kernels read stay; every other dequantize is folded."""

import torch

from et_cuda_passes.quant.unsupported import SuggestedSchemes
from et_cuda_passes.rules.fold import DropActivationQuantization, FoldDequantize
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.rules.vulkan import CopyTiedWeight, KeepVulkanDynamicLinear, KeepVulkanEmbedding, KeepVulkanLinear
from et_cuda_passes.targets.target import Target

_INT4 = "IntxWeightOnlyConfig(torch.int4, PerGroup(32))"

VULKAN = Target(
    "vulkan",
    "ExecuTorch Vulkan delegate",
    kernels={},
    advised=SuggestedSchemes(four_bits=_INT4, eight_bits=_INT4),
    dtypes=(torch.float32, torch.float16),
    refuses_misses=True,
    passes=lambda: [
        *restoring(),
        CopyTiedWeight(),
        KeepVulkanDynamicLinear(),
        # Other layers than the kernel of quantized activations takes are computed with float activations.
        DropActivationQuantization(),
        KeepVulkanLinear(),
        KeepVulkanEmbedding(),
        FoldDequantize(),
    ],
)
