"""Adapters to ExecuTorch: partitioners that take ``passes=``."""

from et_cuda_passes._versions import require_version

require_version("executorch")
