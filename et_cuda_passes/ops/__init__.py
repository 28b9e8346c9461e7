"""Our operators: schema, fake, reference, and decomposition into a device's kernel. Importing registers them."""

from et_cuda_passes.ops.embedding import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.ops.int4_linear import INT4_LINEARS, Int4Linear
from et_cuda_passes.ops.int8_linear import INT8_LINEAR

__all__ = ["INT4_EMBEDDINGS", "INT4_LINEARS", "INT8_EMBEDDING", "INT8_LINEAR", "Int4Linear"]
