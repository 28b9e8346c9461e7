"""Our operators: schema, fake, reference, and decomposition into a device's kernel. Importing registers them."""

from collections.abc import Mapping

from et_cuda_passes.ops.attention import ATTENTION, ATTENTION_DTYPES
from et_cuda_passes.ops.embedding import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.ops.int4_experts import INT4_EXPERTS, Int4Experts
from et_cuda_passes.ops.int4_linear import CPU, METAL, MPS, TILE_PACKED_TO_4D, Int4Linear
from et_cuda_passes.ops.int4_linear_mma_tiled import MMA_TILED
from et_cuda_passes.ops.int8_linear import INT8_LINEAR

INT4_LINEARS: Mapping[str, Int4Linear] = {form.layout: form for form in (MMA_TILED, TILE_PACKED_TO_4D, MPS, METAL, CPU)}
"""Every int4 linear by the layout that it reads."""

__all__ = [
    "ATTENTION",
    "ATTENTION_DTYPES",
    "INT4_EMBEDDINGS",
    "INT4_EXPERTS",
    "INT4_LINEARS",
    "INT8_EMBEDDING",
    "INT8_LINEAR",
    "Int4Experts",
    "Int4Linear",
]
