"""Quantization schemes by name, and what each target does with a layer of each scheme.

The second part is not a table. A small layer is quantized, exported and rewritten, and the outcome is kept.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
    register_quantize_module_handler,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.hf.experts import quantize_stack
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.rules.attention import CastAttention, UnmaskedAttention
from et_cuda_passes.rules.fold import FoldDequantize
from et_cuda_passes.rules.linear import int4_kernel
from et_cuda_passes.targets import default_passes, get_target, targets
from et_cuda_passes.targets.compatibility import packed_layouts
from et_cuda_passes.targets.target import PLAIN

PER_AXIS = 0
"""The group size that stands for one scale per row."""
GROUP_SIZES = (128, 64, 32, 16)
"""The sizes that a group size is adjusted to, the largest first."""
ALGORITHMS = ("hqq", "affine")
"""How scales are chosen. "hqq" minimizes the error of each group, "affine" uses its extreme values."""
_LISTED = 12
"""The most names that a message lists."""
AUTO = "auto"
"""The packing format that leaves the choice to the target."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names that resemble ``name``, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names)
    if near:
        return f"the nearest are {', '.join(near)}" if len(near) > 1 else f"the nearest is {near[0]}"
    more = ", ..." if len(names) > _LISTED else ""
    return f"known are {', '.join(names[:_LISTED]) or 'none'}{more}"


# Schemes --------------------------------------------------------------------------------------------------------------


@dataclass
class AsymmetricHqqConfig(AOBaseConfig):  # type: ignore[misc]
    """4-bit weight-only with a scale and a zero per group, both chosen by HQQ: the numbers of torchao's Metal scheme.

    torchao's own configuration packs the weight at once, for its operator, and needs a macOS build. This one keeps the
    integers in -8..7 and the zeros as floating-point zero points, so that the exported program is still generic.

    Attributes:
        group_size: of the groups along K; 0 for one per row.
    """

    group_size: int = 32


@register_quantize_module_handler(AsymmetricHqqConfig)  # type: ignore[untyped-decorator]
def _quantize_asymmetric(
    module: nn.Module, config: AsymmetricHqqConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    weight = getattr(module, parameter_name)
    group_size = config.group_size or weight.shape[1]
    # weight = (q - zero) * scale with q in 0..15. The integers are stored less 8, and so are the zeros.
    q, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight.detach(),
        nbits=4,
        group_size=group_size,
        compute_dtype=torch.float32,
        device=weight.device,
        raw_output=True,
    )
    quantized = IntxUnpackedToInt8Tensor(
        qdata=(q.to(torch.int16) - 8).to(torch.int8),
        scale=scale.to(weight.dtype),
        zero_point=(zero - 8).to(weight.dtype),
        target_dtype=torch.int4,  # type: ignore[attr-defined]
        block_size=(1, group_size),
        dtype=weight.dtype,
        activation_quantization=None,
    )
    setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
    return module


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized, and for a linear its activations.

    Attributes:
        name: as in the option ``qlinear``, without a target.
        summary: one line for people.
        bits: of the integers.
        dynamic: whether the activations of a linear are quantized to 8 bits when it runs.
        per_row: the scheme always has one scale per row.
        symmetric: whether the weight is integers times scales, without zeros.
        algorithm: the algorithm that the name contains, or None for the option's.
        only_for: the only target that the scheme is for, or None.
        promised: the target that must have a kernel for each layer, or None.
        fallback: the scheme of the layers whose in_features the group size does not divide, or None.
    """

    name: str
    summary: str
    bits: int
    dynamic: bool = False
    per_row: bool = False
    symmetric: bool = True
    algorithm: str | None = None
    only_for: str | None = None
    promised: str | None = None
    fallback: "Scheme | None" = None

    def __str__(self) -> str:
        """The spelling that :func:`parse_scheme` reads."""
        text = self.name if self.promised in (None, self.only_for) else f"{self.promised}:{self.name}"
        return text if self.fallback is None else f"{text},{self.fallback.name}"

    def config(self, group_size: int, algorithm: str) -> AOBaseConfig:
        """torchao's configuration for a weight in groups of ``group_size`` along K, 0 for one scale per row."""
        granularity = PerGroup(group_size) if group_size else PerAxis(0)
        hqq = (self.algorithm or algorithm) == "hqq"
        if not self.symmetric and hqq:
            return AsymmetricHqqConfig(group_size)
        dtype = getattr(torch, f"int{self.bits}")
        mapping = MappingType.SYMMETRIC if self.symmetric else MappingType.ASYMMETRIC
        choose = "hqq_scale_only" if hqq else "affine"
        if self.dynamic:
            return Int8DynamicActivationIntxWeightConfig(
                weight_dtype=dtype,
                weight_granularity=granularity,
                weight_mapping_type=mapping,
                intx_choose_qparams_algorithm=choose,
            )
        return IntxWeightOnlyConfig(
            weight_dtype=dtype,
            granularity=granularity,
            mapping_type=mapping,
            intx_choose_qparams_algorithm=choose,
        )


SCHEMES = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("4w", "4-bit weights", 4),
            Scheme("4w_hqq", "4w, with scales chosen by hqq whatever the option says", 4, algorithm="hqq"),
            Scheme("8w", "8-bit weights", 8),
            Scheme("8da4w", "4-bit weights, and activations quantized to 8 bits when the linear runs", 4, dynamic=True),
            Scheme(
                "8da8w",
                "8-bit weights, one scale per row, and activations quantized to 8 bits when the linear runs",
                8,
                dynamic=True,
                per_row=True,
            ),
            Scheme(
                "fpa4w",
                "4-bit weights with a zero per group, floating-point activations: ExecuTorch's scheme for Metal",
                4,
                symmetric=False,
                only_for="metal",
                promised="metal",
            ),
        )
    }
)
"""Every scheme by its name."""
FOR_EMBEDDINGS = ("4w", "8w", "4w_hqq")
"""The schemes that an embedding can have."""


def parse_scheme(text: str, option: str = "qlinear", embedding: bool = False) -> Scheme:
    """The scheme that ``text`` names: "4w", "cuda:4w" or "8da4w,8da8w".

    A target before the colon is a promise: the target must have a kernel for every layer. After a comma stands the
    scheme of the layers whose in_features the group size does not divide.

    Args:
        text: the name.
        option: the option that contains it, for error messages.
        embedding: accept only the schemes that an embedding can have.

    Raises:
        ValueError: the scheme or the target is unknown, or they do not go together.
    """
    if not isinstance(text, str):
        raise UsageError(f"{option} is the name of a scheme, such as 4w; got {text!r}")
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2:
        raise UsageError(f"{option}={text!r} names {len(parts)} schemes; write one, or two as in 8da4w,8da8w")
    first, *others = (_parse_one(part, option, embedding) for part in parts)
    if not others:
        return first
    (second,) = others
    if second.promised not in (None, second.only_for, first.promised):
        raise UsageError(f"{option}={text!r} names two targets; write {first.promised or second.promised}: once, first")
    return replace(first, fallback=replace(second, promised=first.promised))


def _parse_one(text: str, option: str, embedding: bool) -> Scheme:
    promised, colon, name = text.rpartition(":")
    known = FOR_EMBEDDINGS if embedding else tuple(SCHEMES)
    if name not in SCHEMES:
        raise UsageError(f"{option}={text!r}: there is no scheme {name!r}; {nearest(name, known)}")
    if name not in known:
        raise UsageError(f"{option}={text!r}: {name} is for linears; an embedding has one of {', '.join(known)}")
    scheme = SCHEMES[name]
    if not colon:
        return scheme
    if promised not in targets():
        raise UsageError(f"{option}={text!r}: there is no target {promised!r}; {nearest(promised, targets())}")
    if scheme.only_for not in (None, promised):
        raise UsageError(f"{option}={text!r}: {name} is for {scheme.only_for} alone; {instead(scheme, promised)}")
    return replace(scheme, promised=promised)


# Targets --------------------------------------------------------------------------------------------------------------


class Status(StrEnum):
    """The outcome of a quantized layer on a target, the best first."""

    PACKED = "packed"
    """The weight is packed for a kernel of the target."""
    KEPT = "kept"
    """The backend has a kernel that reads the weight as it was exported."""
    FOLDED = "folded"
    """The weight becomes floating-point again: right, but as large as before it was quantized."""
    IMPOSSIBLE = "impossible"
    """No rule of the target rewrites or keeps the layer."""

    @property
    def has_kernel(self) -> bool:
        """Whether the target computes with the quantized weight."""
        return self in (Status.PACKED, Status.KEPT)


@dataclass(frozen=True)
class Support:
    """The outcome of a layer on a target, with its details.

    Attributes:
        status: the outcome.
        detail: the kernel and layout, in the words of the report.
        layouts: the layouts of the packed int4 constants.
        plain: whether plain operators compute with the packed weight, in place of a kernel.
        reasons: why it is impossible.
    """

    status: Status
    detail: str = ""
    layouts: tuple[str, ...] = ()
    plain: bool = False
    reasons: tuple[Reason, ...] = field(default=(), compare=False)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel computes with the quantized weight."""
        return self.status.has_kernel and not self.plain


_FOLD = FoldDequantize().name
_ROWS = 16
"""N of the layer that is rewritten; every kernel pads N."""
_DTYPES = (torch.bfloat16, torch.float32)
"""The dtypes of models, in the order in which they are tried."""


def formats(target: str) -> tuple[str, ...]:
    """The packing formats of a target's int4 linears, its default first; none if it packs no such weight."""
    return tuple(kernel.layout for kernel in get_target(target).kernels.get("int4_linear", ()))


def passes_with(target: str, packing_format: str, cast_to_bf16: bool = False) -> PassList:
    """The target's pass list, in which each rule of int4 linears packs into ``packing_format``.

    With ``cast_to_bf16`` each rule has that option, and attention of another dtype is cast for a backend that has bf16
    only.
    """
    passes = default_passes(target)
    options: dict[str, dict[str, Any]] = {rule.name: {} for rule in passes}
    if packing_format != AUTO:
        (name,) = (k.name for k in get_target(target).kernels["int4_linear"] if k.layout == packing_format)
        for rule in passes:
            if getattr(rule, "kernel_of", None) is int4_kernel:
                options[rule.name]["kernel"] = name
    if cast_to_bf16:
        for rule in passes:
            if hasattr(rule, "cast_to_bf16"):
                options[rule.name]["cast_to_bf16"] = True
    for rule in (each for each in list(passes) if options[each.name]):
        passes = passes.replace(rule.name, replace(rule, **options[rule.name]))
    if cast_to_bf16 and UnmaskedAttention.name in options:
        passes = passes.insert_before(UnmaskedAttention.name, CastAttention())
    return passes


def casts_to_bf16(target: str) -> bool:
    """Whether the option ``cast_to_bf16`` has an effect on a target."""
    return any(hasattr(rule, "cast_to_bf16") for rule in default_passes(target))


def takes_dtype(target: str, dtype: torch.dtype) -> bool:
    """Whether a target runs a model in ``dtype``. XNNPACK fails for bfloat16 at the end of a lowering."""
    if target == "xnnpack":
        return dtype is not torch.bfloat16
    dtypes = get_target(target).dtypes
    return not dtypes or dtype in dtypes


def support(
    scheme: Scheme,
    group_size: int,
    in_features: int,
    target: str,
    packing_format: str = AUTO,
    kind: str = "linear",
    dtype: torch.dtype | None = None,
    cast_to_bf16: bool = False,
) -> Support:
    """The outcome of a layer of ``in_features`` on ``target``, from rewriting one.

    Args:
        scheme: of the layer; its fallback is not considered.
        group_size: divides ``in_features``, or 0 for one scale per row.
        in_features: K.
        target: the name of a target.
        packing_format: one of :func:`formats`, or "auto".
        kind: "linear", "embedding" or "experts".
        dtype: of the model; None for the best outcome in bfloat16 and float32.
        cast_to_bf16: whether the rules may cast activations to bf16.
    """
    plain = replace(scheme, promised=None, fallback=None)
    found = []
    for each in _DTYPES if dtype is None else (dtype,):
        found.append(_support(plain, group_size, in_features, target, packing_format, kind, each, cast_to_bf16))
        if found[-1].status.has_kernel:
            break
    return min(found, key=lambda each: list(Status).index(each.status))


@cache
def _support(
    scheme: Scheme,
    group_size: int,
    in_features: int,
    target: str,
    packing_format: str,
    kind: str,
    dtype: torch.dtype,
    cast_to_bf16: bool,
) -> Support:
    program = _layer(scheme, group_size, in_features, kind, dtype)
    rewritten, report = rewrite(program, target, passes_with(target, packing_format, cast_to_bf16))
    (outcome,) = report.outcomes
    if outcome.status == "missed":
        return Support(Status.IMPOSSIBLE, reasons=tuple(outcome.reasons))
    if outcome.status == "kept":
        return Support(Status.KEPT, outcome.detail)
    status = Status.FOLDED if outcome.rule == _FOLD else Status.PACKED
    return Support(status, outcome.detail, tuple(packed_layouts(rewritten)), outcome.kernel == PLAIN.name)


@lru_cache(maxsize=64)
def _layer(scheme: Scheme, group_size: int, in_features: int, kind: str, dtype: torch.dtype) -> ExportedProgram:
    """An exported linear or embedding with 16 rows, or two experts of 16 rows, quantized. No random number is drawn."""
    values = torch.linspace(-1, 1, _ROWS * in_features).view(_ROWS, in_features).to(dtype)
    model: Any
    x: Tensor
    if kind == "experts":
        model = _Experts(values.expand(2, -1, -1).clone())
        quantize_stack(model, "stack", scheme.config(group_size, "hqq"))
        x, chosen = torch.zeros(2, in_features, dtype=dtype), torch.tensor([0, 1], dtype=torch.int32)
        with torch.no_grad():
            return torch.export.export(model.eval(), (x, chosen))
    if kind == "embedding":
        model = nn.Embedding(_ROWS, in_features, _weight=values)
        x = torch.zeros(1, 2, dtype=torch.int64)
    else:
        model = nn.utils.skip_init(nn.Linear, in_features, _ROWS, bias=False, dtype=dtype)
        model.weight = nn.Parameter(values, requires_grad=False)
        x = torch.zeros(2, in_features, dtype=dtype)
    quantize_(model, scheme.config(group_size, "hqq"), filter_fn=lambda module, name: True)
    with torch.no_grad():
        return torch.export.export(model.eval(), (x,))


class _Experts(nn.Module):
    """The product of transformers' experts: with rows sorted by expert, or one by one.

    torch exports the first in bf16 only, and for rows of a multiple of 16 bytes.
    """

    is_transposed = False

    def __init__(self, stack: Tensor) -> None:
        super().__init__()
        self.stack = nn.Parameter(stack, requires_grad=False)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16 and x.shape[-1] % 8 == 0:
            return nn.functional.grouped_mm(x, self.stack.transpose(1, 2), offs=chosen)
        return torch.bmm(self.stack[chosen], x.unsqueeze(-1)).squeeze(-1)


def usual_support(scheme: Scheme, target: str, packing_format: str = AUTO, kind: str = "linear") -> Support:
    """The outcome on ``target`` of a layer whose in_features every group size divides.

    A linear has groups of 32, or one scale per row if the target has only that. An embedding has one scale per row.
    """
    sizes = (PER_AXIS,) if scheme.per_row or kind == "embedding" else (32, PER_AXIS)
    found = [support(scheme, size, 256, target, packing_format, kind) for size in sizes]
    return min(found, key=lambda each: (not each.status.has_kernel, each.plain, each.status is Status.IMPOSSIBLE))


def instead(scheme: Scheme, target: str, kind: str = "linear") -> str:
    """The end of an error message: the schemes for which ``target`` has a kernel, those like ``scheme`` first."""
    usable = [
        other
        for other in SCHEMES.values()
        if other.algorithm is None
        and other.only_for in (None, target)
        and not (kind == "experts" and other.dynamic)
        and usual_support(other, target, kind=kind).status.has_kernel
    ]
    if not usable:
        return f"{target} has no kernels for {kind}"
    usable.sort(key=lambda other: (other.bits != scheme.bits, other.dynamic != scheme.dynamic))
    return f"{target} has kernels for {', '.join(str(other) for other in usable)}"
