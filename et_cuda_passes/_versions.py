"""The tested version ranges of the dependencies, checked when a part that needs them is imported."""

import re
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

RANGES = {
    "torch": ("2.11", "2.16"),
    "torchao": ("0.18", "0.19"),
    "executorch": ("1.5", "1.6"),
    "triton": ("3.6", "3.10"),
    "networkx": ("3.4", "3.7"),
    "jinja2": ("3.1", "3.2"),
    "rich": ("14.3", "16"),
    "typer": ("0.20", "0.30"),
    "coremltools": ("9.0", "9.1"),
    "openvino": ("2025.4", "2026"),
    "nncf": ("3.1", "3.3"),
}
"""Distribution -> (lowest tested version, first version beyond the tested ones)."""

REASONS = {
    "torch": "torchao 0.18 loads none of its compiled operators with an older torch",
    "torchao": "ExecuTorch 1.5 requires torchao 0.18",
    "executorch": "the partitioners of an older one lack the hook transform_for_pre_decomposition, in which the "
    "rewrite runs",
    "triton": "torch 2.11 requires triton 3.6",
}
"""Distribution -> what a version below the range lacks.

A version of one of these beyond the range gives a warning: they are released together, and an error would keep a user
from all of them. A version of another distribution beyond its range is an error.
"""


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
        ImportError: the distribution is missing or too old, or beyond the range and not one of :data:`REASONS`; the
            message has the range and the fix.
    """
    lowest, beyond = RANGES[distribution]
    wanted = f"{distribution}>={lowest},<{beyond}"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise ImportError(f"et_cuda_passes needs {wanted}, which is not installed: pip install '{wanted}'") from None
    if _parts(found) < _parts(lowest):
        reason = f"; {REASONS[distribution]}" if distribution in REASONS else ""
        raise ImportError(
            f"et_cuda_passes needs {distribution}>={lowest}, found {found}{reason}: pip install '{wanted}'"
        )
    if _parts(found) < _parts(beyond):
        return
    if distribution not in REASONS:
        raise ImportError(f"et_cuda_passes is tested with {wanted}, found {found}: pip install '{wanted}'")
    # A module is imported once, and so the warning comes once in a process.
    warnings.warn(_untested(distribution, found), stacklevel=2)


def is_at_least(distribution: str, lowest: str) -> bool:
    """Whether the installed version of a distribution is this one or a later one."""
    return _parts(version(distribution)) >= _parts(lowest)


def untested_versions() -> Iterator[str]:
    """A text for each installed distribution that is beyond its tested range, and works with a warning."""
    for distribution in REASONS:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if _parts(found) >= _parts(RANGES[distribution][1]):
            yield _untested(distribution, found)


def _untested(distribution: str, found: str) -> str:
    lowest, beyond = RANGES[distribution]
    return (
        f"et_cuda_passes is tested with {distribution}>={lowest},<{beyond}, found {found}: `et-cuda-passes doctor` "
        "checks whether it works"
    )


def _parts(text: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
