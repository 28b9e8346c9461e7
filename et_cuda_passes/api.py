"""The public names of the package: ``et_cuda_passes`` has all of them, and everything else may change."""

import sys
from typing import TYPE_CHECKING, Any

from et_cuda_passes import layouts, ops
from et_cuda_passes.accuracy import Accuracy, accuracy
from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.report import ExpectationError, LayerAccuracy, Outcome, Reason, Report
from et_cuda_passes.graph.rule import Failure, GroupRule, Keep, Notes, Requirement, Rule, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.decoders import DEQUANTIZE, dequantized, weight_of
from et_cuda_passes.quant.weight import weight_values
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.rules.attention import FuseAttentionTranspose, UnmaskedAttention
from et_cuda_passes.rules.embedding import EmbeddingInt4, EmbeddingInt8, QuantizedEmbedding
from et_cuda_passes.rules.epilogue import FuseGate, RemoveLinearViews
from et_cuda_passes.rules.experts import BmmInt4, CountExperts, EinsumInt4, GroupedMmInt4, IndexedBmmInt4
from et_cuda_passes.rules.float_linear import LinearFloat4, LinearFloat8
from et_cuda_passes.rules.fold import FoldDequantize
from et_cuda_passes.rules.fused_linear import FusedLinearInt4
from et_cuda_passes.rules.linear import ConvInt4, ConvInt8, LinearInt4, LinearInt8
from et_cuda_passes.rules.xnnpack import (
    KeepDynamicInt4,
    KeepDynamicInt8,
    KeepDynamicPerTensor,
    KeepStaticInt8,
)
from et_cuda_passes.targets import Target, default_passes, get_target, targets

if TYPE_CHECKING:
    from et_cuda_passes.executorch.coreml import CoreMLPartitioner as CoreMLPartitioner
    from et_cuda_passes.executorch.cuda import CudaPartitioner
    from et_cuda_passes.executorch.metal import MetalPartitioner
    from et_cuda_passes.executorch.openvino import OpenvinoPartitioner as OpenvinoPartitioner
    from et_cuda_passes.executorch.packed import ModelError, load
    from et_cuda_passes.executorch.partitioner import RewritingPartitioner
    from et_cuda_passes.executorch.vulkan import VulkanPartitioner
    from et_cuda_passes.executorch.xnnpack import XnnpackPartitioner
    from et_cuda_passes.hf.schemes import QuantizationOptions, QuantizationReport, quantize_model_
    from et_cuda_passes.hf.suggestion import suggest_recipe
    from et_cuda_passes.packed_cache import PackedCache

__all__ = [
    "DEQUANTIZE",
    "Accuracy",
    "BmmInt4",
    "Builder",
    "Capture",
    "ConvInt4",
    "ConvInt8",
    "CountExperts",
    "CudaPartitioner",
    "EinsumInt4",
    "EmbeddingInt4",
    "EmbeddingInt8",
    "ExpectationError",
    "Failure",
    "FoldDequantize",
    "FuseAttentionTranspose",
    "FuseGate",
    "FusedLinearInt4",
    "GroupRule",
    "GroupedMmInt4",
    "IndexedBmmInt4",
    "Keep",
    "KeepDynamicInt4",
    "KeepDynamicInt8",
    "KeepDynamicPerTensor",
    "KeepStaticInt8",
    "Kernel",
    "LayerAccuracy",
    "LinearFloat4",
    "LinearFloat8",
    "LinearInt4",
    "LinearInt8",
    "Match",
    "MetalPartitioner",
    "ModelError",
    "Notes",
    "Outcome",
    "PackedCache",
    "Pattern",
    "QuantizationOptions",
    "QuantizationReport",
    "QuantizedEmbedding",
    "Reason",
    "RemoveLinearViews",
    "Report",
    "Requirement",
    "RewritingPartitioner",
    "Rule",
    "RuleError",
    "Target",
    "UnmaskedAttention",
    "Unmet",
    "VulkanPartitioner",
    "XnnpackPartitioner",
    "accuracy",
    "any_of",
    "default_passes",
    "dequantized",
    "get_target",
    "layouts",
    "load",
    "op",
    "ops",
    "quantize_model_",
    "requirement",
    "rewrite",
    "suggest_recipe",
    "targets",
    "weight_of",
    "weight_values",
]

# ExecuTorch and the configurations of torchao take seconds to import, and a rewrite needs neither. Those of CoreML and
# OpenVINO need packages that may be missing, so `from et_cuda_passes import *` leaves them out.
_LAZY = {
    "CoreMLPartitioner": "executorch.coreml",
    "OpenvinoPartitioner": "executorch.openvino",
    "VulkanPartitioner": "executorch.vulkan",
    "CudaPartitioner": "executorch.cuda",
    "MetalPartitioner": "executorch.metal",
    "RewritingPartitioner": "executorch.partitioner",
    "XnnpackPartitioner": "executorch.xnnpack",
    "PackedCache": "packed_cache",
    "ModelError": "executorch.packed",
    "load": "executorch.packed",
    "QuantizationOptions": "hf.schemes",
    "QuantizationReport": "hf.schemes",
    "quantize_model_": "hf.schemes",
    "suggest_recipe": "hf.suggestion",
}


# Old names with the new ones, for the error about an old name.
_RENAMED = {
    "MatchContext": "Match",
    "JointRule": "GroupRule",
    "Int4Kernel": "Kernel",
    "ChosenExpertsInt4": "IndexedBmmInt4",
    "affine": "weight_of",
    "dequantize": "dequantized",
    "require": "requirement",
    "AttentionViews": "FuseAttentionTranspose",
    "Int4Gate": "FuseGate",
    "LinearViews": "RemoveLinearViews",
}

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            from importlib import import_module

            return getattr(import_module(f"et_cuda_passes.{_LAZY[name]}"), name)
        if name in _RENAMED:
            raise AttributeError(f"et_cuda_passes.{name} is now et_cuda_passes.{_RENAMED[name]}")
        raise AttributeError(f"module 'et_cuda_passes' has no attribute {name!r}")


# The package gets the names too. Until now, the imports above let its attributes `rewrite` and `accuracy` be modules.
vars(sys.modules["et_cuda_passes"]).update((name, value) for name, value in globals().copy().items() if name in __all__)
