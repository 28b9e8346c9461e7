"""Adapters to ExecuTorch: partitioners with a pass list, lowering, and saved programs."""

from et_cuda_passes._versions import require_version

require_version("executorch")
