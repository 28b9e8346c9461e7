"""The package's operators: schema, fake, implementation, and decomposition per device. Importing registers them."""

from collections.abc import Mapping

from et_cuda_passes.layouts import LAYOUTS
from et_cuda_passes.ops.attention import ATTENTION, ATTENTION_DTYPES
from et_cuda_passes.ops.dequantize import (
    DEQUANTIZE_FLOAT4,
    DEQUANTIZE_FLOAT8,
    DEQUANTIZE_INT4_NESTED,
    DEQUANTIZE_INT4_TILES,
)
from et_cuda_passes.ops.embedding import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.ops.float8_linear import FLOAT8_DTYPES, FLOAT8_LINEAR
from et_cuda_passes.ops.int4_experts import INT4_EXPERTS, Int4Experts
from et_cuda_passes.ops.int4_linear import Int4Linear, define_int4_linear
from et_cuda_passes.ops.int4_linear_mma_tiled import MMA_TILED
from et_cuda_passes.ops.int8_linear import INT8_LINEAR

INT4_LINEARS: Mapping[str, Int4Linear] = {
    layout.name: MMA_TILED if layout is MMA_TILED.layout else define_int4_linear(layout) for layout in LAYOUTS.values()
}
"""Every int4 linear by the name of the layout that it reads."""

__all__ = [
    "ATTENTION",
    "ATTENTION_DTYPES",
    "DEQUANTIZE_FLOAT4",
    "DEQUANTIZE_FLOAT8",
    "DEQUANTIZE_INT4_NESTED",
    "DEQUANTIZE_INT4_TILES",
    "FLOAT8_DTYPES",
    "FLOAT8_LINEAR",
    "INT4_EMBEDDINGS",
    "INT4_EXPERTS",
    "INT4_LINEARS",
    "INT8_EMBEDDING",
    "INT8_LINEAR",
    "MMA_TILED",
    "Int4Experts",
    "Int4Linear",
]
