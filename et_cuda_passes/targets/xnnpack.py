"""xnnpack: ExecuTorch's XNNPACK delegate. Patterns that it reads correctly stay; every other dequantize is folded.

XNNPACK has no quantized embedding, so embeddings become operators of ExecuTorch's own kernels.
"""

from et_cuda_passes.quant.advised import SuggestedSchemes
from et_cuda_passes.rules.bias_apart import BiasApart
from et_cuda_passes.rules.fold_dequantize import FoldDequantize
from et_cuda_passes.rules.keep_dynamic_int4 import KeepDynamicInt4
from et_cuda_passes.rules.keep_dynamic_int8 import KeepDynamicInt8
from et_cuda_passes.rules.keep_dynamic_per_tensor import KeepDynamicPerTensor
from et_cuda_passes.rules.keep_static_int8 import KeepStaticInt8
from et_cuda_passes.rules.quantized_embedding import QuantizedEmbedding
from et_cuda_passes.targets.target import Target

XNNPACK = Target(
    "xnnpack",
    "ExecuTorch XNNPACK delegate",
    kernels={},
    advised=SuggestedSchemes(
        four_bits="Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))",
        eight_bits="Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))",
    ),
    passes=lambda: [
        BiasApart(),
        KeepDynamicInt4(),
        KeepDynamicInt8(),
        KeepDynamicPerTensor(),
        KeepStaticInt8(),
        QuantizedEmbedding(),
        FoldDequantize(),
    ],
)
