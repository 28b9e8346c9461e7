"""Packages with rules and targets for tests: folders that look installed."""

import textwrap
from pathlib import Path

RULE = '''
import dataclasses

import torch

import et_cuda_passes as ecp

aten = torch.ops.aten


@ecp.requirement("a floating-point x", hint="convert x")
def x_is_floating_point(m):
    return None if m.val(m.x).dtype.is_floating_point else ecp.Failure(str(m.val(m.x).dtype))


@dataclasses.dataclass(frozen=True)
class WriteSilu(ecp.Rule):
    """x * sigmoid(x) -> silu(x)"""

    requirements = (x_is_floating_point,)

    def pattern(self, x):
        return ecp.op(aten.mul.Tensor)(x, ecp.op(aten.sigmoid.default)(x))

    def rewrite(self, b, m):
        return b.call(aten.silu.default, m.x)


RULES = {"cpu": [WriteSilu()]}
'''
"""A module with a rule and the mapping of an entry point."""


def install(
    folder: Path, package: str, source: str = RULE, entry: str = "RULES", group: str = "rules", version: str = "1.0"
) -> Path:
    """Write a package that looks installed in ``folder``: its module, and its metadata with one entry point."""
    module = package.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[et_cuda_passes.{group}]\n{module} = {module}:{entry}\n")
    return folder
