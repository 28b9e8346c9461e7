"""One architecture on every target: outcomes by component, and the error against the generic program."""

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.components import split_model, structural_copy
from tests.zoo.models import Model

# The targets of a dtype, with the scheme. XNNPACK has kernels for activations quantized at run time, and folds 4w.
PLANS: tuple[tuple[torch.dtype, str, tuple[str, ...]], ...] = (
    (torch.bfloat16, "4w", ("cuda", "metal")),
    (torch.float32, "4w", ("cpu",)),
    (torch.float32, "8da4w", ("xnnpack",)),
)
CACHE = 32


@dataclass
class Row:
    """One component for one target.

    Attributes:
        target: the target.
        component: the component; empty if nothing was traced.
        linears: the linears and convolutions of the component that have a quantized weight.
        rewritten, kept, missed: the outcomes.
        reasons: of those missed, each once.
        difference: of the outputs from those of the generic program, relative to their size; None if not run.
        error: what failed, and whose step it was.
    """

    target: str
    component: str
    linears: int = 0
    rewritten: int = 0
    kept: int = 0
    missed: int = 0
    reasons: tuple[str, ...] = ()
    difference: float | None = None
    error: str = ""


def record(model: Model, progress: Callable[[str], None] = lambda step: None) -> list[dict[str, Any]]:
    """The rows of a model."""
    rows: list[Row] = []
    for dtype, scheme, targets in PLANS:
        # Metal has no kernel for experts: quantized for both, they would stay floating-point for cuda too.
        for group in [(each,) for each in targets] if model.has_experts else [targets]:
            progress(f"{model.model_type} {scheme} {str(dtype).removeprefix('torch.')} for {', '.join(group)}")
            rows += _rows(model, dtype, scheme, group)
            gc.collect()
    return [asdict(row) for row in rows]


def _rows(model: Model, dtype: torch.dtype, scheme: str, targets: tuple[str, ...]) -> list[Row]:
    # A failure before this package has a program is transformers' own, and is named so.
    try:
        root = structural_copy(model.build(dtype))
        parts = components(model, root, dtype)
    except Exception as error:
        return [Row(target, "", error=f"transformers, splitting: {_line(error)}") for target in targets]
    rows: list[Row] = []
    config = EtConfig(target=",".join(targets), qlinear=scheme)
    pools = {target: ConstantCache() for target in targets}
    for name, part in parts.items():
        try:
            traced = EtExporter().trace({name: part}, {name: config}, root)
        except Exception as error:
            # The exporter wraps an error of transformers in a RuntimeError. Its own errors name the cause.
            tracing = isinstance(error, RuntimeError) and error.__cause__ is not None
            step = f"transformers, tracing: {_line(error.__cause__)}" if tracing else str(error)
            rows += [Row(target, name, error=step) for target in targets]
            continue
        program = traced.programs[name]
        arguments = program.example_inputs[1]
        expected = _outputs(program, arguments)
        for target in targets:
            rows.append(_row(program, target, name, arguments, expected, pools[target]))
    return rows


def components(model: Model, root: Any, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Any]]:
    """The parts of a model with their inputs."""
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in model.inputs().items()}
    if not model.generates:
        return {"model": (root, inputs)}
    config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    config.cache_implementation = model.cache
    if model.cache:
        config.max_cache_len = CACHE
    config.decoder_start_token_id = getattr(root.config, "decoder_start_token_id", None)
    return split_model(root, inputs, config, False)


def _row(
    program: ExportedProgram,
    target: str,
    component: str,
    arguments: Mapping[str, Any],
    expected: list[Tensor],
    pool: ConstantCache,
) -> Row:
    row = Row(target, component)
    try:
        rewritten, report = ecp.rewrite(program, target, pool=pool)
        counts = report.counts()
        row.rewritten, row.kept, row.missed = counts["rewritten"], counts["kept"], counts["missed"]
        row.linears = len(report.outcomes)
        reasons = [str(reason) for each in report.outcomes if each.status == "missed" for reason in each.reasons]
        row.reasons = tuple(dict.fromkeys((*reasons, *report.warnings)))
        row.difference = difference(_outputs(rewritten, arguments), expected)
    except Exception as error:
        row.error = f"et_cuda_passes: {_line(error)}"
    return row


def _outputs(program: ExportedProgram, arguments: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        # A static cache among the arguments is mutated.
        outputs = program.module()(**copy.deepcopy(dict(arguments)))
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest error of an output, relative to the norm of what is expected; infinite if one is not finite."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel() == 0:
            continue
        one, other = one.double(), other.double()
        same = torch.isfinite(one) == torch.isfinite(other)
        if not bool(same.all()):
            return float("inf")
        finite = torch.isfinite(other)
        norm = torch.linalg.vector_norm(other[finite]).clamp_min(1e-6)
        worst = max(worst, float(torch.linalg.vector_norm((one - other)[finite]) / norm))
    return worst


def _line(error: BaseException | None) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
