"""Quantization schemes: the one decoder of dequantize operators, and where dequantized weights are read."""

from et_cuda_passes._versions import require_version

require_version("torchao")
