"""The decision about each weight of a model, before any of them is changed."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.hf.conv1d import is_conv1d
from et_cuda_passes.hf.encoders import encoder_fqns
from et_cuda_passes.hf.experts import is_experts, is_quantized_stack, matrices, quantized_stacks
from et_cuda_passes.hf.options import DEFAULT_GROUP_SIZE, QuantizationOptions
from et_cuda_passes.hf.recipe import Entry, Recipe
from et_cuda_passes.hf.report import LayerReport, QuantizationReport
from et_cuda_passes.hf.support import (
    AUTO,
    FOR_EMBEDDINGS,
    GROUP_SIZES,
    PER_AXIS,
    SCHEMES,
    Scheme,
    Status,
    Support,
    instead,
    nearest,
    support,
    usual_support,
)
from et_cuda_passes.targets import get_target

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# Layers ---------------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A linear, a stack of experts or an embedding of the model, or another module with a matrix."""

    fqn: str
    module: nn.Module
    weight: Tensor
    kind: str
    encoder: bool

    @property
    def in_features(self) -> int:
        """K, the columns of the weight."""
        return int(self.weight.shape[-1])


@dataclass(frozen=True)
class Decision:
    """The scheme and the group size of a weight, or the reason why it stays as it is."""

    scheme: Scheme | None
    group_size: int = PER_AXIS
    algorithm: str | None = None
    adjusted_from: int | None = None
    reason: str = ""
    pattern: str | None = None


class _NoFit(Exception):
    """No group size fits a layer; the text says why."""


def _layers(model: nn.Module) -> list[Layer]:
    """The linears, the embeddings, and the parameters of other modules with matrices, in the model's order."""
    encoders = encoder_fqns(model)
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    found = []
    for module, fqns in names.items():
        encoder = all(any(fqn == part or fqn.startswith(f"{part}.") for part in encoders) for fqn in fqns)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = "linear" if isinstance(module, nn.Linear) else "embedding"
            found.append(Layer(fqns[0], module, module.weight, kind, encoder))
        elif is_conv1d(module) and fqns[0]:
            found.append(Layer(fqns[0], module, module.get_parameter("weight").t(), "linear", encoder))
        elif not isinstance(module, nn.modules.conv._ConvNd) and not is_quantized_stack(module):
            for name, integers in quantized_stacks(module).items():
                found.append(Layer(f"{fqns[0]}.{name}" if fqns[0] else name, module, integers, "experts", encoder))
            for name, parameter in module.named_parameters(recurse=False):
                fqn = f"{fqns[0]}.{name}" if fqns[0] else name
                if is_experts(module):
                    if parameter.dim() == 3:
                        found.append(Layer(fqn, module, matrices(module, parameter), "experts", encoder))
                elif parameter.dim() in (2, 3) and parameter.is_floating_point() and min(parameter.shape[-2:]) >= 16:
                    found.append(Layer(fqn, module, parameter, "other", encoder))
    return found


def _weight_key(weight: Tensor) -> tuple[Any, ...]:
    """Equal for two parameters that are the same memory."""
    if type(weight) not in (Tensor, nn.Parameter):
        return (id(weight),)
    place = (weight.device, weight.untyped_storage().data_ptr(), weight.storage_offset())
    return (*place, weight.dtype, tuple(weight.shape), weight.stride())


def _unquantizable(layer: Layer) -> str | None:
    """Why the layer has no quantized form."""
    weight = layer.weight
    if layer.kind == "other":
        if weight.dim() == 3:
            return (
                f"a parameter of three dimensions of {type(layer.module).__name__}, which is no known stack of experts"
            )
        return f"a matrix of {type(layer.module).__name__}, which is neither a linear nor an embedding"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"quantized before: its weight is a {type(weight).__name__}"
    if layer.kind == "experts" and not weight.is_floating_point():
        return f"quantized before: a parametrization dequantizes {_dtype_name(weight.dtype)}"
    if layer.kind == "experts" and not weight.numel():
        return "a stack without values"
    if isinstance(layer.module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight itself, past the linear"
    if layer.kind != "experts" and not is_conv1d(layer.module) and _reads_weight_itself(layer.module):
        return f"{type(layer.module).__name__} reads this weight itself, and not as {_article(layer.kind)}"
    if weight.dtype not in _FLOATS:
        return f"a weight in {str(weight.dtype).removeprefix('torch.')}, which torchao does not quantize"
    return None


def _reads_weight_itself(module: nn.Module) -> bool:
    """Whether a subclass has a forward that calls neither its base class nor the functional form.

    Whisper's positions are an embedding whose forward indexes the weight, which no quantized tensor supports.
    """
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ("super",))
    return forward not in (nn.Linear.forward, nn.Embedding.forward) and not {
        "super",
        "forward",
        "linear",
        "embedding",
    } & set(names)


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "embedding" else f"a {kind}"


def _fit(
    scheme: Scheme, wanted: int, k: int, kind: str, fallback: str, goals: Mapping[str, str]
) -> tuple[Scheme, int, str]:
    """The scheme and the group size of a layer, and the reason if they are not those that are wanted.

    The size is one for which every target has a kernel. If none is, a target that has kernels for other layers of the
    scheme may compute with floating-point weights.

    Args:
        scheme: the scheme that is wanted.
        wanted: the group size that is wanted.
        k: in_features.
        kind: "embedding" if only embeddings read the weight, else "linear" or "experts".
        fallback: the option ``group_size_fallback``.
        goals: the packing format for each named target.

    Raises:
        _NoFit: nothing fits, or ``fallback`` allows no other group size.
    """

    try:
        return _fit_with(scheme, wanted, k, kind, fallback, goals, may_fold=False)
    except _NoFit:
        return _fit_with(scheme, wanted, k, kind, fallback, goals, may_fold=True)


def _fit_with(
    scheme: Scheme, wanted: int, k: int, kind: str, fallback: str, goals: Mapping[str, str], may_fold: bool
) -> tuple[Scheme, int, str]:
    """As :func:`_fit`; without ``may_fold``, a target lacks a size without a kernel if it has a kernel for another.

    Such a target would fold the weight, or compute with plain operators.
    """

    def lacking(scheme: Scheme, size: int) -> list[str]:
        def lacks(name: str) -> bool:
            layout = goals[name] if scheme.bits == 4 and kind == "linear" else AUTO
            found = support(scheme, size, k, name, layout, kind)
            if (found.plain or found.status is Status.FOLDED) and not may_fold:
                return usual_support(scheme, name, kind=kind).has_kernel
            return found.status is Status.IMPOSSIBLE

        return [name for name in goals if lacks(name)]

    if scheme.per_row or wanted == PER_AXIS:
        without = lacking(scheme, PER_AXIS)
        if without:
            what = f"{'experts with ' if kind == 'experts' else ''}in_features {k}"
            raise _NoFit(f"{' and '.join(without)} has no kernel of {scheme.name} for {what}")
        other = wanted not in (DEFAULT_GROUP_SIZE, PER_AXIS)
        return scheme, PER_AXIS, f"{scheme.name} has one scale per row" if other else ""
    if k % wanted == 0:
        without = lacking(scheme, wanted)
        if not without:
            return scheme, wanted, ""
        why = f"{' and '.join(without)} has no kernel of {scheme.name} for groups of {wanted}"
        if kind == "experts":
            why += " of experts"
        elif any(support(scheme, wanted, 32 * wanted, name).has_kernel for name in without):
            why += f" and in_features {k}"
    else:
        why = f"in_features {k} is no multiple of {wanted}"
        if scheme.fallback is not None and not lacking(scheme.fallback, PER_AXIS):
            return replace(scheme.fallback, fallback=None), PER_AXIS, why
    if fallback != "adjust":
        raise _NoFit(why)
    for size in (*(size for size in GROUP_SIZES if size <= wanted and k % size == 0), PER_AXIS):
        if not lacking(scheme, size):
            return scheme, size, why
    wider = SCHEMES["8da8w" if scheme.dynamic else "8w"]
    hint = f"; {scheme.name},{wider.name} gives it 8 bits" if scheme.bits == 4 and not lacking(wider, PER_AXIS) else ""
    raise _NoFit(f"{why}, and no smaller group size has a kernel on {' and '.join(lacking(scheme, PER_AXIS))}{hint}")


def _no_experts(scheme: Scheme, names: Sequence[str]) -> str:
    """Why stacks of experts do not have ``scheme`` on the targets ``names``; empty if they do."""
    if scheme.dynamic:
        return f"{scheme.name} quantizes the activations of linears; a recipe may give experts another scheme, as 4w"
    found = {name: usual_support(scheme, name, kind="experts").status for name in names}
    without = [name for name, status in found.items() if status is Status.IMPOSSIBLE]
    if names and not any(status.has_kernel for status in found.values()):
        without = list(names)
    return f"{' and '.join(without)} has no kernel of {scheme.name} for experts" if without else ""


# Plan -----------------------------------------------------------------------------------------------------------------


class Plan:
    """Decides about every weight of a model and changes nothing."""

    def __init__(self, model: nn.Module, options: QuantizationOptions) -> None:
        self.options = options
        self.layers = _layers(model)
        self.groups: dict[tuple[Any, ...], list[Layer]] = {}
        for layer in self.layers:
            self.groups.setdefault(_weight_key(layer.weight), []).append(layer)
        self.warnings: list[str] = []
        self.problems: list[str] = []
        if any(layer.weight.device.type == "meta" for layer in self.layers):
            raise UsageError("the model's weights are on the meta device; load the weights before it is quantized")
        self._check_encoder_options()
        self._check_patterns()
        self._check_group_sizes()
        self.decisions = {key: self._decide(group) for key, group in self.groups.items()}
        if self.problems:
            raise UsageError("\n".join(self.problems))
        self._check_kernels()

    def _check_encoder_options(self) -> None:
        names = [name for name in ("qlinear_encoder", "qembedding_encoder") if getattr(self.options, name) is not None]
        if names and not any(layer.encoder for layer in self.layers):
            instead = names[0].removesuffix("_encoder")
            raise UsageError(f"{names[0]} is given, and the model has no encoder beside other parts; use {instead}")

    def _check_patterns(self) -> None:
        source = self.options.recipe.source if isinstance(self.options.recipe, Recipe) else ""
        fqns = [layer.fqn for layer in self.layers if layer.kind != "other"]
        deciding = {self._entry_of(group) for group in self.groups.values()}
        for entry in self.options.entries:
            if not any(map(entry.matches, fqns)):
                near = nearest(entry.pattern, fqns)
                raise UsageError(f"{source}: the pattern {entry.pattern} matches no linear and no embedding; {near}")
            if entry not in deciding:
                self.warnings.append(
                    f"{source}: entries before it decide about every layer that {entry.pattern} matches"
                )

    def _check_group_sizes(self) -> None:
        """Refuse a group size that divides no layer, unless it is a usual one, which is adjusted to the layers."""
        options = self.options
        adjusted = (PER_AXIS, *GROUP_SIZES) if options.group_size_fallback == "adjust" else (PER_AXIS,)
        for encoder, suffix in ((False, ""), (True, "_encoder")):
            for kind, scheme in (
                ("linear", options.linear_scheme(encoder)),
                ("embedding", options.embedding_scheme(encoder)),
            ):
                size = options.group_size(kind == "embedding", encoder)
                kinds = ("linear", "experts") if kind == "linear" else (kind,)
                ks = {each.in_features for each in self.layers if each.kind in kinds and each.encoder == encoder}
                if scheme is None or scheme.per_row or scheme.fallback or size in adjusted or not ks:
                    continue
                if not any(k % size == 0 for k in ks):
                    valid = [each for each in GROUP_SIZES if any(k % each == 0 for k in ks)]
                    raise UsageError(
                        f"q{kind}_group_size{suffix}={size} divides the in_features of no {kind} "
                        f"({', '.join(map(str, sorted(ks)[:6]))}); valid are {', '.join(map(str, (*valid, PER_AXIS)))}"
                    )

    def _entry_of(self, group: Iterable[Layer]) -> Entry | None:
        """The entry of the recipe that decides about a weight. The name of any layer that reads the weight counts."""
        fqns = [layer.fqn for layer in group]
        return next((entry for entry in self.options.entries if any(map(entry.matches, fqns))), None)

    def _decide(self, group: Sequence[Layer]) -> Decision:
        options, first = self.options, group[0]
        unquantizable = next(filter(None, map(_unquantizable, group)), None)
        if unquantizable is not None:
            return Decision(None, reason=unquantizable)
        if len(group) > 1 and any(is_conv1d(layer.module) for layer in group):
            return Decision(None, reason="a weight of Conv1D that other modules share, which torchao does not quantize")
        if first.kind == "experts" and len(group) > 1:
            return Decision(None, reason="a stack of experts that several modules share")
        encoder = all(layer.encoder for layer in group)
        embeddings, linears = any(each.kind == "embedding" for each in group), first.kind == "experts"
        linears = linears or any(each.kind == "linear" for each in group)
        kind = first.kind if first.kind == "experts" else "linear" if linears else "embedding"
        table = options.embedding_scheme(encoder) if embeddings else None
        linear = options.linear_scheme(encoder) if linears else None
        scheme, size = table or linear, options.group_size(table is not None or not linears, encoder)
        if table is not None and linear is not None and linear.dynamic:
            # One weight with the embedding's bits; the linear quantizes its activations as the other linears do.
            scheme = replace(SCHEMES[f"8da{table.bits}w"], algorithm=table.algorithm)
        entry = self._entry_of(group)
        pattern = entry.pattern if entry else None
        algorithm = options.algorithm
        if entry is not None:
            if entry.skip:
                return Decision(None, reason="the recipe skips it", pattern=pattern)
            scheme = entry.scheme or scheme
            size = size if entry.group_size is None else entry.group_size
            algorithm = entry.algorithm or algorithm
            problem = _entry_problem(entry, scheme, first, kind, options.targets)
            if problem:
                self.problems.append(f"recipe pattern {entry.pattern}: {problem}")
                return Decision(None)
        if scheme is None:
            option = ("qlinear" if linears else "qembedding") + ("_encoder" if encoder else "")
            return Decision(None, reason=f"{option} is not given", pattern=pattern)
        if kind == "experts" and (why := _no_experts(scheme, self._targets(scheme))):
            return Decision(None, reason=why, pattern=pattern)
        # NaN is the smallest and the largest of whatever contains it; isfinite takes several times as long.
        if first.weight.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(first.weight)):
            self.problems.append(f"{first.fqn}: the weight contains NaN or infinity; repair the checkpoint")
            return Decision(None)
        k = first.in_features
        goals = {name: options.packing_format(name, encoder) for name in self._targets(scheme)}
        try:
            fitted, fitted_size, why = _fit(scheme, size, k, kind, options.group_size_fallback, goals)
        except _NoFit as no_fit:
            fallback = options.group_size_fallback
            if fallback == "error" or (scheme.promised and fallback == "adjust"):
                self.problems.append(f"{first.fqn}: {no_fit}; change the group size, or skip the layer in a recipe")
            return Decision(None, reason=str(no_fit), pattern=pattern)
        chosen = fitted.algorithm or algorithm
        return Decision(fitted, fitted_size, chosen, size if why else None, why, pattern)

    def _targets(self, scheme: Scheme) -> tuple[str, ...]:
        """The targets that are named, by the option or else by the scheme."""
        return self.options.targets or ((scheme.promised,) if scheme.promised else ())

    def _check_kernels(self) -> None:
        """Warn of what a named target does with the linears and the experts, by scheme and dtype."""
        checked = set()
        for kind in ("linear", "experts"):
            for key, group in self.groups.items():
                decision, layer = self.decisions[key], next((each for each in group if each.kind == kind), None)
                if decision.scheme is None or layer is None:
                    continue
                for name in self._targets(decision.scheme):
                    case = (decision.scheme, layer.weight.dtype, name, kind, layer.encoder)
                    if case not in checked:
                        self._check_kernel(decision.scheme, decision.group_size, layer, name)
                    checked.add(case)

    def _check_kernel(self, scheme: Scheme, size: int, layer: Layer, target: str) -> None:
        kind, dtype = layer.kind, layer.weight.dtype
        format_counts = scheme.bits == 4 and kind == "linear"
        layout = self.options.packing_format(target, layer.encoder) if format_counts else AUTO

        def found(dtype: torch.dtype | None, cast: bool) -> Support:
            return support(scheme, size, layer.in_features, target, layout, kind, dtype, cast)

        def works(dtype: torch.dtype | None) -> bool:
            """Whether the target has a rule, and the packing format if there is one."""
            case = found(dtype, self.options.cast_to_bf16)
            return case.status is not Status.IMPOSSIBLE if layout == AUTO else layout in case.layouts

        quantizes_activations = kind == "linear" and self.options.quantizes_activations_of(scheme, target)
        if found(dtype, False).status is Status.FOLDED and not quantizes_activations:
            of_experts = " of experts" if kind == "experts" else ""
            self.warnings.append(
                f"{target} has no kernel for {scheme.name}{of_experts} and computes with floating-point weights; "
                f"{instead(scheme, target, kind)}"
            )
        if works(dtype) or not works(None):
            return
        usable = " or ".join(f"model.to(torch.{_dtype_name(each)})" for each in _FLOATS if works(each))
        kernel = f"kernel of {scheme.name}" if layout == AUTO else f"kernel of {scheme.name} in {layout}"
        text = f"{target} has no {kernel} for a model in {_dtype_name(dtype)}; convert it with {usable}"
        if found(dtype, True).status is not Status.IMPOSSIBLE:
            text += ", or give cast_to_bf16=True, which casts activations to bf16 for such kernels alone"
        if target == scheme.promised or layout != AUTO or get_target(target).refuses_misses:
            raise UsageError(text)
        if text not in self.warnings:
            self.warnings.append(text)

    def _quantized(self) -> Iterator[tuple[list[Layer], Decision]]:
        """The layers of each weight that is quantized, a linear first: torchao reads the bias of a linear too."""
        for key, decision in self.decisions.items():
            if decision.scheme is not None:
                yield sorted(self.groups[key], key=lambda layer: layer.kind != "linear"), decision

    def configs(self) -> OrderedDict[str, AOBaseConfig]:
        """torchao's configuration by FQN: one for each weight."""
        found = OrderedDict()
        for (first, *_), decision in self._quantized():
            assert decision.scheme is not None and decision.algorithm is not None
            found[first.fqn] = decision.scheme.config(decision.group_size, decision.algorithm)
        return found

    def shared(self) -> list[list[Any]]:
        """The modules of each quantized weight that several share, the one that is quantized first."""
        return [[layer.module for layer in group] for group, _ in self._quantized() if len(group) > 1]

    def report(self) -> QuantizationReport:
        """One entry for each layer."""
        found = []
        for layer in self.layers:
            key = _weight_key(layer.weight)
            decision, group = self.decisions[key], self.groups[key]
            found.append(
                LayerReport(
                    fqn=layer.fqn,
                    kind=layer.kind,
                    out_features=int(layer.weight.shape[-2]),
                    in_features=layer.in_features,
                    encoder=layer.encoder,
                    scheme=None if decision.scheme is None else decision.scheme.name,
                    group_size=None if decision.scheme is None else decision.group_size,
                    algorithm=decision.algorithm,
                    adjusted_from=decision.adjusted_from,
                    reason=decision.reason,
                    pattern=decision.pattern,
                    tied_to=tuple(other.fqn for other in group if other is not layer),
                    experts=len(layer.weight) if layer.kind == "experts" else 1,
                )
            )
        return QuantizationReport(found, list(self.warnings))


def _entry_problem(entry: Entry, scheme: Scheme | None, layer: Layer, kind: str, names: Iterable[str]) -> str:
    """Why a recipe's entry cannot decide about a layer; empty if it can."""
    if scheme is None:
        return f'no scheme is given for {layer.fqn}; add scheme = "4w" to the entry'
    if kind == "experts" and scheme.dynamic and entry.scheme is not None:
        return (
            f"{layer.fqn} is a stack of experts, and {scheme.name} quantizes the activations of linears; put an entry "
            'for it before this one, with scheme = "4w" or skip = true'
        )
    if kind == "embedding" and scheme.name not in FOR_EMBEDDINGS:
        return (
            f"{layer.fqn} is an embedding, and {scheme.name} is for linears; put an entry for it before this one, with "
            f"one of {', '.join(FOR_EMBEDDINGS)} or skip = true"
        )
    if scheme.per_row and entry.group_size:
        return f"{scheme.name} has one scale per row; remove group_size"
    for name in names:
        # Experts of the options' scheme stay floating-point where it has no kernel.
        of_entry = kind != "experts" or entry.scheme is not None
        if of_entry and usual_support(scheme, name, kind=kind).status is Status.IMPOSSIBLE:
            return f"{name} has no kernel of {scheme.name} for {layer.fqn}; {instead(scheme, name, kind)}"
    return ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
