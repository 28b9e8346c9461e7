"""et_cuda_passes: one generic quantization, rewritten for each ExecuTorch backend, with the fate of every layer told.

The public interface; everything else may change.
"""

from typing import TYPE_CHECKING, Any

from et_cuda_passes import layouts, ops
from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.report import ExpectationError, Outcome, Reason, Report
from et_cuda_passes.graph.rule import Failure, GroupRule, Keep, Notes, Requirement, Rule, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.affine import DEQUANTIZE, dequantized, weight_of
from et_cuda_passes.rules.attention_views import AttentionViews
from et_cuda_passes.rules.bmm_int4 import BmmInt4
from et_cuda_passes.rules.chosen_experts_int4 import ChosenExpertsInt4
from et_cuda_passes.rules.conv_int4 import ConvInt4
from et_cuda_passes.rules.conv_int8 import ConvInt8
from et_cuda_passes.rules.einsum_int4 import EinsumInt4
from et_cuda_passes.rules.embedding_int4 import EmbeddingInt4
from et_cuda_passes.rules.embedding_int8 import EmbeddingInt8
from et_cuda_passes.rules.fold_dequantize import FoldDequantize
from et_cuda_passes.rules.fused_linear_int4 import FusedLinearInt4
from et_cuda_passes.rules.grouped_mm_int4 import GroupedMmInt4
from et_cuda_passes.rules.int4_gate import Int4Gate
from et_cuda_passes.rules.keep_dynamic_int4 import KeepDynamicInt4
from et_cuda_passes.rules.keep_dynamic_int8 import KeepDynamicInt8
from et_cuda_passes.rules.keep_dynamic_per_tensor import KeepDynamicPerTensor
from et_cuda_passes.rules.keep_static_int8 import KeepStaticInt8
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.linear_int8 import LinearInt8
from et_cuda_passes.rules.linear_views import LinearViews
from et_cuda_passes.rules.quantized_embedding import QuantizedEmbedding
from et_cuda_passes.rules.unmasked_attention import UnmaskedAttention
from et_cuda_passes.targets import Target, default_passes, targets
from et_cuda_passes.targets.rewrite import rewrite

if TYPE_CHECKING:
    from et_cuda_passes.executorch.cuda import CudaPartitioner
    from et_cuda_passes.executorch.metal import MetalPartitioner
    from et_cuda_passes.executorch.packed import ModelError, load
    from et_cuda_passes.executorch.xnnpack import XnnpackPartitioner

__all__ = [
    "DEQUANTIZE",
    "AttentionViews",
    "BmmInt4",
    "Builder",
    "Capture",
    "ChosenExpertsInt4",
    "ConvInt4",
    "ConvInt8",
    "CudaPartitioner",
    "EinsumInt4",
    "EmbeddingInt4",
    "EmbeddingInt8",
    "ExpectationError",
    "Failure",
    "FoldDequantize",
    "FusedLinearInt4",
    "GroupRule",
    "GroupedMmInt4",
    "Int4Gate",
    "Keep",
    "KeepDynamicInt4",
    "KeepDynamicInt8",
    "KeepDynamicPerTensor",
    "KeepStaticInt8",
    "Kernel",
    "LinearInt4",
    "LinearInt8",
    "LinearViews",
    "Match",
    "MetalPartitioner",
    "ModelError",
    "Notes",
    "Outcome",
    "Pattern",
    "QuantizedEmbedding",
    "Reason",
    "Report",
    "Requirement",
    "Rule",
    "RuleError",
    "Target",
    "UnmaskedAttention",
    "Unmet",
    "XnnpackPartitioner",
    "any_of",
    "default_passes",
    "dequantized",
    "layouts",
    "load",
    "op",
    "ops",
    "requirement",
    "rewrite",
    "targets",
    "weight_of",
]

# ExecuTorch takes seconds to import, and only lowering needs it.
_LAZY = {
    "CudaPartitioner": "cuda",
    "MetalPartitioner": "metal",
    "XnnpackPartitioner": "xnnpack",
    "ModelError": "packed",
    "load": "packed",
}


# Old names with the new ones, for the error that somebody gets who still uses an old one.
_RENAMED = {
    "MatchContext": "Match",
    "JointRule": "GroupRule",
    "Int4Kernel": "Kernel",
    "affine": "weight_of",
    "dequantize": "dequantized",
    "require": "requirement",
}

if not TYPE_CHECKING:  # or a type checker would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            from importlib import import_module

            return getattr(import_module(f"et_cuda_passes.executorch.{_LAZY[name]}"), name)
        if name in _RENAMED:
            raise AttributeError(f"et_cuda_passes.{name} is now et_cuda_passes.{_RENAMED[name]}")
        raise AttributeError(f"module 'et_cuda_passes' has no attribute {name!r}")
