"""The tested version ranges of the dependencies, checked when a part that needs them is imported."""

import re
from importlib.metadata import PackageNotFoundError, version

RANGES = {
    "torch": ("2.11", "2.16"),
    "torchao": ("0.18", "0.19"),
    "executorch": ("1.5.1", "1.6"),
    "triton": ("3.6", "3.10"),
    "networkx": ("3.4", "3.7"),
    "rich": ("14.3", "16"),
    "typer": ("0.20", "0.30"),
    "coremltools": ("9.0", "9.1"),
    "openvino": ("2025.4", "2026"),
    "nncf": ("3.1", "3.3"),
}
"""Distribution -> (lowest tested version, first version beyond the tested ones)."""


def version_problem(distribution: str) -> str:
    """Why a distribution is missing or not tested, with the command that installs a tested one; empty if it is."""
    lowest, beyond = RANGES[distribution]
    wanted = f"{distribution}>={lowest},<{beyond}"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{wanted}, which is not installed: pip install '{wanted}'"
    if _parts(lowest) <= _parts(found) < _parts(beyond):
        return ""
    return f"{wanted}, and the installed {found} is not tested: pip install '{wanted}'"


def require_version(distribution: str) -> None:
    """Check that an installed distribution is within its tested range.

    Raises:
        ImportError: the distribution is missing or has another version; the message has the range and the fix.
    """
    if problem := version_problem(distribution):
        raise ImportError(f"et_cuda_passes needs {problem}")


def _parts(text: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
