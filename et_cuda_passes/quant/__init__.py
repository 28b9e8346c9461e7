"""Quantized weights and activations: their decoders, and the operators that read them."""

from et_cuda_passes._versions import require_version

require_version("torchao")
