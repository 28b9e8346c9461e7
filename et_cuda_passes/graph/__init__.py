"""Patterns, rules, the driver and the report, over torch.fx and ExportedProgram. No quantization, no backend."""

from et_cuda_passes._versions import require_version

require_version("torch")
require_version("networkx")
require_version("jinja2")
