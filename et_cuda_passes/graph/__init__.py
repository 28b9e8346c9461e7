"""Patterns, rules and program surgery over torch.fx and ExportedProgram; knows no quantization and no backend."""

from et_cuda_passes._versions import require_version

require_version("torch")
require_version("networkx")
