"""xnnpack: ExecuTorch's XNNPACK delegate. Patterns that it reads correctly stay; every other dequantize is folded.

XNNPACK has no quantized embedding, so embeddings become operators of ExecuTorch's own kernels.
"""

from et_cuda_passes.quant.unsupported import SuggestedSchemes
from et_cuda_passes.rules.embedding import QuantizedEmbedding
from et_cuda_passes.rules.fold import FoldDequantize
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.rules.xnnpack import (
    KeepDynamicInt4,
    KeepDynamicInt8,
    KeepDynamicPerTensor,
    KeepStaticInt8,
    SplitBroadcastBias,
)
from et_cuda_passes.rules.xnnpack_activations import ShareActivation
from et_cuda_passes.rules.xnnpack_attention import AttentionOfGroups
from et_cuda_passes.rules.xnnpack_operators import ExpandTanhGelu, LargestAlone, ProductAsLinear
from et_cuda_passes.targets.target import Target

XNNPACK = Target(
    "xnnpack",
    "ExecuTorch XNNPACK delegate",
    kernels={},
    advised=SuggestedSchemes(
        four_bits="Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))",
        eight_bits="Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))",
        table="IntxWeightOnlyConfig(torch.int4, PerGroup(32)): quantized_embedding takes up to 8 bits in groups along "
        "K",
    ),
    refuses_misses=True,
    passes=lambda: [
        *restoring(),
        SplitBroadcastBias(),
        ExpandTanhGelu(),
        LargestAlone(),
        AttentionOfGroups(),
        ShareActivation(),
        KeepDynamicInt4(),
        KeepDynamicInt8(),
        KeepDynamicPerTensor(),
        KeepStaticInt8(),
        QuantizedEmbedding(),
        FoldDequantize(),
        ProductAsLinear(),
    ],
)
