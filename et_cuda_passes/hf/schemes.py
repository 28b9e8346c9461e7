"""``quantize_model_``: quantize the linears and embeddings of a model by the names of schemes.

Nothing is quantized before everything is checked. Each linear and each embedding has one entry in the report, with its
scheme, or with the reason why it stays floating-point.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.hf.encoders import encoder_fqns
from et_cuda_passes.hf.recipe import Entry, Recipe, check_group_size
from et_cuda_passes.hf.report import LayerReport, QuantizationReport
from et_cuda_passes.hf.support import (
    ALGORITHMS,
    AUTO,
    FOR_EMBEDDINGS,
    GROUP_SIZES,
    PER_AXIS,
    SCHEMES,
    Scheme,
    Status,
    formats,
    instead,
    nearest,
    parse_scheme,
    passes_with,
    support,
    usual_support,
)
from et_cuda_passes.rules.xnnpack import FoldDequantize
from et_cuda_passes.targets import targets

__all__ = [
    "LayerReport",
    "QuantizationOptions",
    "QuantizationReport",
    "Scheme",
    "check_schemes",
    "expected_counts",
    "parse_scheme",
    "passes_for",
    "promised_targets",
    "quantize_model_",
]

FALLBACKS = ("error", "skip", "adjust")
"""What happens to a layer whose in_features the group size does not divide."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# Options --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizationOptions:
    """The options of :func:`quantize_model_`. Those that end in ``_encoder`` are for the encoders of a model.

    Attributes:
        qlinear: the scheme of the linears; see :func:`parse_scheme`.
        qlinear_group_size: the group size of the linears along in_features; 0 for one scale per row.
        qlinear_packing_format: the layout of the targets' int4 linears: "auto", one of the target's formats, or a
            format for each of several targets, as in "cuda:tile_packed_to_4d,metal:mps". It selects the kernel and
            does not change the quantization.
        qembedding: the scheme of the embeddings, "4w" or "8w".
        qembedding_group_size: the group size of the embeddings; 0 for one scale per row.
        qlinear_encoder: as ``qlinear``.
        qlinear_group_size_encoder: as ``qlinear_group_size``.
        qlinear_packing_format_encoder: as ``qlinear_packing_format``.
        qembedding_encoder: as ``qembedding``.
        qembedding_group_size_encoder: as ``qembedding_group_size``.
        algorithm: how scales are chosen: "hqq" minimizes the error of each group, "affine" uses its extreme values.
        recipe: a TOML file, its mapping, or a :class:`Recipe`, with other values for single layers.
        target: the targets, separated by commas; None for any.
        group_size_fallback: what happens to a layer whose in_features the group size does not divide, or for whose
            group size a named target has no kernel. "adjust" uses the largest of 128, 64, 32 and 16 that fits, or else
            one scale per row. "skip" leaves the layer as it is. "error" refuses the model.

    Raises:
        ValueError: an option has a value that no target accepts.
    """

    qlinear: str | None = None
    qlinear_group_size: int = 32
    qlinear_packing_format: str | None = None
    qembedding: str | None = None
    qembedding_group_size: int = PER_AXIS
    qlinear_encoder: str | None = None
    qlinear_group_size_encoder: int = 32
    qlinear_packing_format_encoder: str | None = None
    qembedding_encoder: str | None = None
    qembedding_group_size_encoder: int = PER_AXIS
    algorithm: str = "hqq"
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None
    target: str | Sequence[str] | None = None
    group_size_fallback: str = "adjust"

    def __post_init__(self) -> None:
        for suffix in ("", "_encoder"):
            for name in ("qlinear", "qembedding"):
                if getattr(self, name + suffix) is not None:
                    parse_scheme(getattr(self, name + suffix), name + suffix, embedding=name == "qembedding")
            check_group_size(getattr(self, f"qlinear_group_size{suffix}"), f"qlinear_group_size{suffix}", 16)
            check_group_size(getattr(self, f"qembedding_group_size{suffix}"), f"qembedding_group_size{suffix}")
            self.packing_format(None, encoder=bool(suffix))
        for name, known in (("algorithm", ALGORITHMS), ("group_size_fallback", FALLBACKS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} is unknown; {nearest(str(getattr(self, name)), known)}")
        split_targets(self.target)
        if self.recipe is not None:
            object.__setattr__(self, "recipe", Recipe.load(self.recipe))

    @staticmethod
    def of(options: Mapping[str, Any]) -> "QuantizationOptions":
        """The options with these names and values.

        Raises:
            ValueError: an option is unknown, or has a value that no target accepts.
        """
        known = [field.name for field in fields(QuantizationOptions)]
        for name in options:
            if name not in known:
                raise UsageError(f"there is no option {name!r}; {nearest(name, known)}")
        return QuantizationOptions(**options)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets; empty for any."""
        return split_targets(self.target)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries of the recipe."""
        return self.recipe.entries if isinstance(self.recipe, Recipe) else ()

    def linear_scheme(self, encoder: bool) -> Scheme | None:
        """The scheme of the linears."""
        text = self.qlinear_encoder if encoder else self.qlinear
        return None if text is None else parse_scheme(text)

    def embedding_scheme(self, encoder: bool) -> Scheme | None:
        """The scheme of the embeddings."""
        text = self.qembedding_encoder if encoder else self.qembedding
        return None if text is None else parse_scheme(text, "qembedding", embedding=True)

    def group_size(self, embedding: bool, encoder: bool) -> int:
        """The group size of the linears or of the embeddings."""
        name = ("qembedding" if embedding else "qlinear") + "_group_size" + ("_encoder" if encoder else "")
        size: int = getattr(self, name)
        return size

    def schemes(self) -> dict[str, tuple[Scheme, bool]]:
        """Every scheme that the options name, and whether it is for embeddings, by where it stands."""
        found: dict[str, tuple[Scheme, bool]] = {}
        for encoder, suffix in ((False, ""), (True, "_encoder")):
            linear, embedding = self.linear_scheme(encoder), self.embedding_scheme(encoder)
            if linear is not None:
                found[f"qlinear{suffix}"] = (linear, False)
            if embedding is not None:
                found[f"qembedding{suffix}"] = (embedding, True)
        for entry in self.entries:
            if entry.scheme is not None:
                found[f"recipe pattern {entry.pattern}"] = (entry.scheme, False)
        return found

    def packing_format(self, target: str | None, encoder: bool = False) -> str:
        """The packing format for ``target``; None only checks the option.

        Raises:
            ValueError: the format is unknown, or not one of the target's.
        """
        option = "qlinear_packing_format" + ("_encoder" if encoder else "")
        text = getattr(self, option)
        if text is None:
            return AUTO
        if not isinstance(text, str):
            raise UsageError(f"{option} is the name of a packing format; got {text!r}")
        known = [AUTO, *dict.fromkeys(name for each in targets() for name in formats(each))]
        chosen = AUTO
        for part in (part.strip() for part in text.split(",")):
            named, colon, name = part.rpartition(":")
            if name not in known:
                raise UsageError(f"{option}={part!r}: there is no packing format {name!r}; {nearest(name, known)}")
            if colon and named not in targets():
                raise UsageError(f"{option}={part!r}: there is no target {named!r}; {nearest(named, targets())}")
            place = named if colon else target
            if place is not None and name not in (AUTO, *formats(place)):
                those = [each for each in targets() if name in formats(each)]
                raise UsageError(
                    f"{option}={part!r} is not for {place}, which has {', '.join((AUTO, *formats(place)))}; write "
                    + " or ".join(f"{each}:{name}" for each in those)
                    + " to choose it for that target alone"
                )
            if place is not None and place == target:
                chosen = name
        return chosen


def split_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in "cuda,xnnpack", or in a sequence of names.

    Raises:
        ValueError: a target is unknown.
    """
    if target is None:
        return ()
    names = target.split(",") if isinstance(target, str) else list(target)
    names = [name.strip() if isinstance(name, str) else name for name in names]
    for name in names:
        if name not in targets():
            raise UsageError(f"there is no target {name!r}; {nearest(str(name), targets())}")
    return tuple(dict.fromkeys(names))


# Targets --------------------------------------------------------------------------------------------------------------


def promised_targets(options: QuantizationOptions) -> frozenset[str]:
    """The targets that must have a kernel for every layer, by a scheme such as "cuda:4w"."""
    return frozenset(scheme.promised for scheme, _ in options.schemes().values() if scheme.promised is not None)


def expected_counts(options: QuantizationOptions, target: str) -> dict[str, int] | None:
    """The counts for ``expect=`` of a rewrite for ``target``: no layer is missed or folded if a scheme promises that."""
    if target not in promised_targets(options):
        return None
    names = [each.name for each in passes_for(options, target)]
    fold = FoldDequantize().name
    return {"missed": 0} | ({fold: 0} if fold in names else {})


def passes_for(options: QuantizationOptions, target: str, encoder: bool = False) -> PassList:
    """The target's pass list, in which the int4 linears use the kernel of the options' packing format.

    Raises:
        ValueError: the packing format is not one of the target's.
    """
    return passes_with(target, options.packing_format(target, encoder))


def check_schemes(options: QuantizationOptions, target: str | Sequence[str] | None = None) -> None:
    """Check that the schemes, the packing formats and the targets go together.

    Args:
        options: the options.
        target: all targets of the export; None for those of the options.

    Raises:
        ValueError: they do not; the message contains the nearest valid choices.
    """
    names = options.targets if target is None else split_targets(target)
    for place, (scheme, embedding) in options.schemes().items():
        if names and scheme.promised is not None and scheme.promised not in names:
            raise UsageError(
                f"{place}={scheme} promises kernels of {scheme.promised}, and the target is {', '.join(names)}; "
                + " and ".join(instead(replace(scheme, promised=None), name) for name in names)
            )
        for name in names or ((scheme.promised,) if scheme.promised else ()):
            status = usual_support(scheme, name, embedding=embedding).status
            kept_promise = status.has_kernel or name != scheme.promised
            if status is Status.IMPOSSIBLE or not kept_promise:
                does = "has no kernel for" if status is Status.IMPOSSIBLE else "folds"
                raise UsageError(f"{place}={scheme}: {name} {does} {scheme.name}; {instead(scheme, name)}")
    for encoder in (False, True):
        linear = options.linear_scheme(encoder)
        for name in names or (None,):
            layout = options.packing_format(name, encoder)
            if name is None or layout == AUTO or linear is None:
                continue
            if linear.bits > 4:
                usable = ", ".join(each.name for each in SCHEMES.values() if each.bits == 4 and each.only_for is None)
                raise UsageError(
                    f"the packing format {layout} holds 4-bit weights, and {linear} has {linear.bits} bits; "
                    f"use one of {usable}, or leave the packing format out"
                )
            size = PER_AXIS if linear.per_row else options.group_size(False, encoder)
            k = max(1024, 32 * size)
            if not support(linear, size, k, name, layout).status.has_kernel:
                others = [each for each in (256, *GROUP_SIZES) if support(linear, each, 1024, name, layout).status.has_kernel]
                raise UsageError(
                    f"the packing format {layout} of {name} has no kernel for groups of {size}; use one of "
                    f"{', '.join(map(str, others))}"
                )
    _check_group_sizes(options, names)


def _check_group_sizes(options: QuantizationOptions, names: Sequence[str]) -> None:
    """Refuse a group size for which a target has no kernel, whatever K is, if "adjust" would not find a smaller one."""
    for encoder, suffix in ((False, ""), (True, "_encoder")):
        scheme, size = options.linear_scheme(encoder), options.group_size(False, encoder)
        if scheme is None or scheme.per_row or size == PER_AXIS or scheme.bits > 4:
            continue
        for name in names:
            if support(scheme, size, 32 * size, name).status is not Status.IMPOSSIBLE:
                continue
            good = [each for each in (256, *GROUP_SIZES) if support(scheme, each, 1024, name).status is not Status.IMPOSSIBLE]
            good.sort(key=lambda each: abs(each - size))
            raise UsageError(
                f"qlinear_group_size{suffix}={size}: {name} has no kernel of {scheme.name} for groups of {size}; "
                f"the nearest that it has are {', '.join(map(str, good[:2]))}"
            )


# Layers ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """A linear or an embedding of the model, or another module with a matrix."""

    fqn: str
    module: nn.Module
    weight: Tensor
    kind: str
    encoder: bool

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[-1])


@dataclass(frozen=True)
class _Decision:
    """What happens to a weight: a scheme with a group size, or the reason why there is none."""

    scheme: Scheme | None
    group_size: int = PER_AXIS
    algorithm: str | None = None
    adjusted_from: int | None = None
    reason: str = ""
    pattern: str | None = None


class _NoFit(Exception):
    """No group size fits a layer; the text says why."""


def _layers(model: nn.Module) -> list[_Layer]:
    """The linears, the embeddings, and the other matrices of modules that are neither, in the model's order."""
    encoders = encoder_fqns(model)
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    found = []
    for module, fqns in names.items():
        encoder = all(any(fqn == part or fqn.startswith(f"{part}.") for part in encoders) for fqn in fqns)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = "linear" if isinstance(module, nn.Linear) else "embedding"
            found.append(_Layer(fqns[0], module, module.weight, kind, encoder))
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() in (2, 3) and parameter.is_floating_point() and min(parameter.shape[-2:]) >= 16:
                    fqn = f"{fqns[0]}.{name}" if fqns[0] else name
                    found.append(_Layer(fqn, module, parameter, "other", encoder))
    return found


def _weight_key(weight: Tensor) -> tuple[Any, ...]:
    """Equal for two parameters that are the same memory."""
    if type(weight) not in (Tensor, nn.Parameter):
        return (id(weight),)
    return (weight.untyped_storage().data_ptr(), weight.storage_offset(), tuple(weight.shape), weight.stride())


def _unquantizable(layer: _Layer) -> str | None:
    """Why the layer has no quantized form."""
    weight = layer.weight
    if layer.kind == "other":
        if weight.dim() == 3:
            return "a stack of matrices, such as experts, which torchao's configurations do not accept"
        return f"a matrix of {type(layer.module).__name__}, which is neither a linear nor an embedding"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"quantized before: {type(weight.data).__name__}"
    if isinstance(layer.module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight itself, past the linear"
    if weight.dtype not in _FLOATS:
        return f"a weight in {str(weight.dtype).removeprefix('torch.')}, which torchao does not quantize"
    return None


def _fit(
    scheme: Scheme, wanted: int, k: int, embedding: bool, fallback: str, goals: Mapping[str, str]
) -> tuple[Scheme, int, str]:
    """The scheme and the group size of a layer, and the reason if they are not those that are wanted.

    Args:
        scheme: the scheme that is wanted.
        wanted: the group size that is wanted.
        k: in_features.
        embedding: whether only embeddings read the weight.
        fallback: the option ``group_size_fallback``.
        goals: the packing format for each named target.

    Raises:
        _NoFit: nothing fits, or ``fallback`` allows no other group size.
    """

    def lacking(scheme: Scheme, size: int) -> list[str]:
        def status(name: str) -> Status:
            layout = goals[name] if scheme.bits == 4 and not embedding else AUTO
            return support(scheme, size, k, name, layout, embedding).status

        return [name for name in goals if status(name) is Status.IMPOSSIBLE]

    if scheme.per_row or wanted == PER_AXIS:
        without = lacking(scheme, PER_AXIS)
        if without:
            raise _NoFit(f"{' and '.join(without)} has no kernel of {scheme.name} for in_features {k}")
        return scheme, PER_AXIS, ""
    if k % wanted == 0:
        without = lacking(scheme, wanted)
        if not without:
            return scheme, wanted, ""
        why = f"{' and '.join(without)} has no kernel of {scheme.name} for groups of {wanted} and in_features {k}"
    else:
        why = f"in_features {k} is no multiple of {wanted}"
        if scheme.fallback is not None and not lacking(scheme.fallback, PER_AXIS):
            return replace(scheme.fallback, fallback=None), PER_AXIS, why
    if fallback != "adjust":
        raise _NoFit(why)
    for size in (*(size for size in GROUP_SIZES if size <= wanted and k % size == 0), PER_AXIS):
        if not lacking(scheme, size):
            return scheme, size, why
    raise _NoFit(f"{why}, and no other group size has a kernel on {' and '.join(lacking(scheme, PER_AXIS))}")


# Plan -----------------------------------------------------------------------------------------------------------------


class _Plan:
    """Decides about every weight of a model and changes nothing."""

    def __init__(self, model: nn.Module, options: QuantizationOptions) -> None:
        self.options = options
        self.layers = _layers(model)
        self.groups: dict[tuple[Any, ...], list[_Layer]] = {}
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
        self._check_dtypes()

    def _check_encoder_options(self) -> None:
        names = [name for name in ("qlinear_encoder", "qembedding_encoder") if getattr(self.options, name) is not None]
        if names and not any(layer.encoder for layer in self.layers):
            raise UsageError(
                f"{names[0]} is given, and the model has no encoder beside other parts; use {names[0].removesuffix('_encoder')}"
            )

    def _check_patterns(self) -> None:
        source = self.options.recipe.source if isinstance(self.options.recipe, Recipe) else ""
        fqns = [layer.fqn for layer in self.layers if layer.kind != "other"]
        used = set()
        for group in self.groups.values():
            used.add(self._entry_of(group))
        for entry in self.options.entries:
            if not any(entry.matches(fqn) for fqn in fqns):
                raise UsageError(f"{source}: the pattern {entry.pattern} matches no linear or embedding; {nearest(entry.pattern, fqns[:200]) if fqns else 'there is none'}")
            if entry not in used:
                self.warnings.append(f"{source}: an earlier entry decides about every layer that {entry.pattern} matches")

    def _check_group_sizes(self) -> None:
        """Refuse an unusual group size that divides no layer. The usual ones are adjusted to the layers."""
        for encoder, suffix in ((False, ""), (True, "_encoder")):
            scheme, size = self.options.linear_scheme(encoder), self.options.group_size(False, encoder)
            ks = {layer.in_features for layer in self.layers if layer.kind == "linear" and layer.encoder is encoder}
            if scheme is None or scheme.per_row or size in (PER_AXIS, *GROUP_SIZES) or not ks:
                continue
            if not any(k % size == 0 for k in ks):
                good = [each for each in GROUP_SIZES if any(k % each == 0 for k in ks)]
                raise UsageError(
                    f"qlinear_group_size{suffix}={size} divides the in_features of no linear "
                    f"({', '.join(map(str, sorted(ks)[:6]))}); valid are {', '.join(map(str, (*good, PER_AXIS)))}"
                )

    def _entry_of(self, group: Iterable[_Layer]) -> Entry | None:
        """The entry of the recipe that decides about a weight. The name of any layer that reads the weight counts."""
        fqns = [layer.fqn for layer in group]
        return next((entry for entry in self.options.entries if any(map(entry.matches, fqns))), None)

    def _decide(self, group: Sequence[_Layer]) -> _Decision:
        options, first = self.options, group[0]
        unquantizable = next(filter(None, map(_unquantizable, group)), None)
        if unquantizable is not None:
            return _Decision(None, reason=unquantizable)
        encoder = all(layer.encoder for layer in group)
        embeddings, linears = (any(layer.kind == kind for layer in group) for kind in ("embedding", "linear"))
        table = options.embedding_scheme(encoder) if embeddings else None
        linear = options.linear_scheme(encoder) if linears else None
        scheme, size = table or linear, options.group_size(table is not None, encoder)
        if table is not None and linear is not None and linear.dynamic:
            # One weight with the embedding's bits; the linear quantizes its activations as the other linears do.
            scheme = replace(SCHEMES[f"8da{table.bits}w"], algorithm=table.algorithm)
        entry = self._entry_of(group)
        pattern = entry.pattern if entry else None
        algorithm = options.algorithm
        if entry is not None:
            if entry.skip:
                return _Decision(None, reason="the recipe skips it", pattern=pattern)
            scheme = entry.scheme or scheme
            size = size if entry.group_size is None else entry.group_size
            algorithm = entry.algorithm or algorithm
            if scheme is not None and embeddings and not linears and scheme.name not in FOR_EMBEDDINGS:
                self.problems.append(
                    f"recipe pattern {entry.pattern}: {first.fqn} is an embedding, and {scheme.name} is for linears; "
                    f"put an entry for it before, with one of {', '.join(FOR_EMBEDDINGS)}"
                )
                return _Decision(None)
            if scheme is None:
                self.problems.append(f"recipe pattern {entry.pattern}: no scheme is given for {first.fqn}; add scheme = \"4w\"")
                return _Decision(None)
        if scheme is None:
            option = ("qlinear" if linears else "qembedding") + ("_encoder" if encoder else "")
            return _Decision(None, reason=f"{option} is not given", pattern=pattern)
        if not bool(torch.isfinite(first.weight).all()):
            self.problems.append(f"{first.fqn}: the weight contains NaN or infinity; repair the checkpoint")
            return _Decision(None)
        k = first.in_features
        goals = {name: options.packing_format(name, encoder) for name in options.targets}
        try:
            fitted, fitted_size, why = _fit(scheme, size, k, not linears, options.group_size_fallback, goals)
        except _NoFit as no_fit:
            if options.group_size_fallback == "error" or (scheme.promised and scheme.promised in (options.targets or (scheme.promised,))):
                self.problems.append(f"{first.fqn}: {no_fit}; change the group size, or skip the layer in a recipe")
            return _Decision(None, reason=str(no_fit), pattern=pattern)
        chosen = fitted.algorithm or algorithm
        return _Decision(fitted, fitted_size, chosen, size if why else None, why, pattern)

    def _check_dtypes(self) -> None:
        """A target may have a kernel of a scheme and not for the model's dtype."""
        seen = set()
        for key, group in self.groups.items():
            decision = self.decisions[key]
            scheme, dtype = decision.scheme, group[0].weight.dtype
            if scheme is None or not any(layer.kind == "linear" for layer in group):
                continue
            for name in self.options.targets or ((scheme.promised,) if scheme.promised else ()):
                if (scheme, dtype, name) in seen:
                    continue
                seen.add((scheme, dtype, name))
                size, k = decision.group_size, group[0].in_features
                if support(scheme, size, k, name, dtype=dtype).status is not Status.IMPOSSIBLE:
                    continue
                if support(scheme, size, k, name).status is Status.IMPOSSIBLE:
                    continue
                usable = [each for each in _FLOATS if support(scheme, size, k, name, dtype=each).status.has_kernel]
                text = (
                    f"{name} has no kernel of {scheme.name} for a model in {_dtype_name(dtype)}: convert the model, for "
                    f"example with model.to(torch.{_dtype_name(usable[0])})"
                    if usable
                    else f"{name} has no kernel of {scheme.name} for a model in {_dtype_name(dtype)}"
                )
                if name == scheme.promised:
                    raise UsageError(text)
                self.warnings.append(text)

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
                )
            )
        return QuantizationReport(found, list(self.warnings))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def quantize_model_(model: nn.Module, **options: Any) -> QuantizationReport:
    """Quantize the linears and the embeddings of ``model`` in place.

    A weight that several layers share, such as that of an embedding and a tied lm_head, is quantized once and stays
    shared: with the embedding's scheme if there is one, else with the linear's.

    Args:
        model: any module; encoders are recognized by the methods and names that transformers gives its models.
        options: those of :class:`QuantizationOptions`, by name.

    Returns:
        The report, with one entry for each linear and each embedding.

    Raises:
        ValueError: the options do not go together or do not fit the model. The model is then unchanged.
        OSError: the recipe cannot be read.
    """
    chosen = QuantizationOptions.of(options)
    check_schemes(chosen)
    plan = _Plan(model, chosen)
    report = plan.report()
    configs: OrderedDict[str, Any] = OrderedDict()
    for key, decision in plan.decisions.items():
        if decision.scheme is not None and decision.algorithm is not None:
            first = plan.groups[key][0]
            configs[first.fqn] = decision.scheme.config(decision.group_size, decision.algorithm)
    if configs:
        quantize_(model, FqnToConfig(fqn_to_config=configs))
    for key, decision in plan.decisions.items():
        first, *others = plan.groups[key]
        if decision.scheme is not None:
            for other in others:
                other.module.weight = first.module.weight
    return report
