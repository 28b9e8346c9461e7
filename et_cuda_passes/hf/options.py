"""The options of a quantization, and whether schemes, packing formats and targets go together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.hf.recipe import Entry, Recipe, check_group_size
from et_cuda_passes.hf.support import (
    ALGORITHMS,
    AUTO,
    FOR_EMBEDDINGS,
    GROUP_SIZES,
    PER_AXIS,
    SCHEMES,
    Scheme,
    Status,
    casts_to_bf16,
    formats,
    instead,
    nearest,
    parse_scheme,
    passes_with,
    support,
    takes_dtype,
    usual_support,
)
from et_cuda_passes.rules.fold import FoldDequantize
from et_cuda_passes.rules.xnnpack_activations import QuantizeActivation, ShareActivation
from et_cuda_passes.targets import own_targets, targets

XNNPACK_WEIGHT_ONLY = ("fold", "dynamic-activation")
"""The ways to treat a 4-bit weight for xnnpack whose scheme does not quantize activations."""
FALLBACKS = ("error", "skip", "adjust")
"""The ways to treat a layer whose in_features the group size does not divide."""
DEFAULT_GROUP_SIZE = 32
_SUGGESTED = (256, *GROUP_SIZES)
"""The group sizes that an error message suggests."""


# Options --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizationOptions:
    """The options of :func:`quantize_model_`. Those that end in ``_encoder`` are for the encoders of a model.

    Attributes:
        qlinear: the scheme of the linears, and of experts unless it quantizes activations; see :func:`parse_scheme`.
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
        cast_to_bf16: activations of a dtype that a target's kernels lack are cast to bf16 for these kernels and their
            results back, with the precision of bf16. cuda also casts attention. It is for a model in float32 that is
            exported for xnnpack and for other targets at once, and does not change the quantization.
        xnnpack_weight_only: see :class:`~et_cuda_passes.hf.EtConfig`; it does not change the quantization.

    Raises:
        ValueError: an option has a value that no target accepts.
    """

    qlinear: str | None = None
    qlinear_group_size: int = DEFAULT_GROUP_SIZE
    qlinear_packing_format: str | None = None
    qembedding: str | None = None
    qembedding_group_size: int = PER_AXIS
    qlinear_encoder: str | None = None
    qlinear_group_size_encoder: int = DEFAULT_GROUP_SIZE
    qlinear_packing_format_encoder: str | None = None
    qembedding_encoder: str | None = None
    qembedding_group_size_encoder: int = PER_AXIS
    algorithm: str = "hqq"
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None
    target: str | Sequence[str] | None = None
    group_size_fallback: str = "adjust"
    cast_to_bf16: bool = False
    xnnpack_weight_only: str = "fold"

    def __post_init__(self) -> None:
        for suffix in ("", "_encoder"):
            for name in ("qlinear", "qembedding"):
                if getattr(self, name + suffix) is not None:
                    parse_scheme(getattr(self, name + suffix), name + suffix, embedding=name == "qembedding")
            check_group_size(getattr(self, f"qlinear_group_size{suffix}"), f"qlinear_group_size{suffix}", 16)
            check_group_size(getattr(self, f"qembedding_group_size{suffix}"), f"qembedding_group_size{suffix}")
            self.packing_formats(encoder=bool(suffix))
        checked = {
            "algorithm": ALGORITHMS,
            "group_size_fallback": FALLBACKS,
            "xnnpack_weight_only": XNNPACK_WEIGHT_ONLY,
        }
        for name, known in checked.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is unknown; {nearest(str(getattr(self, name)), known)}"
                )
        split_targets(self.target)
        if self.recipe is not None:
            object.__setattr__(self, "recipe", Recipe.load(self.recipe))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, from which ``QuantizationOptions(**data)`` builds equal ones."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["recipe"] = self.recipe.to_dict() if isinstance(self.recipe, Recipe) else None
        found["target"] = ",".join(self.targets) or None
        return found

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

    def quantizes_activations_of(self, scheme: Scheme, target: str) -> bool:
        """Whether ``xnnpack_weight_only`` gives linears of the scheme kernels that quantize activations."""
        dynamic = target == "xnnpack" and self.xnnpack_weight_only == "dynamic-activation"
        return dynamic and scheme.bits == 4 and not scheme.dynamic

    def schemes(self) -> dict[str, tuple[Scheme, bool | None]]:
        """Every scheme that the options name, by where it stands, and whether it is for embeddings; None for either."""
        found: dict[str, tuple[Scheme, bool | None]] = {}
        for encoder, suffix in ((False, ""), (True, "_encoder")):
            linear, embedding = self.linear_scheme(encoder), self.embedding_scheme(encoder)
            if linear is not None:
                found[f"qlinear{suffix}"] = (linear, False)
            if embedding is not None:
                found[f"qembedding{suffix}"] = (embedding, True)
        for entry in self.entries:
            if entry.scheme is not None:
                found[f"recipe pattern {entry.pattern}"] = (entry.scheme, None)
        return found

    def packing_formats(self, encoder: bool = False) -> dict[str | None, str]:
        """The packing formats that the option names, by target; None stands for every target.

        Raises:
            ValueError: a format or a target is unknown, or the target does not have the format.
        """
        option = "qlinear_packing_format" + ("_encoder" if encoder else "")
        text = getattr(self, option)
        if text is None:
            return {}
        if not isinstance(text, str):
            raise UsageError(f"{option} is the name of a packing format; got {text!r}")
        owners = dict.fromkeys((*own_targets(), *self.targets))
        known = [AUTO, *dict.fromkeys(name for each in owners for name in formats(each))]
        found: dict[str | None, str] = {}
        for part in (part.strip() for part in text.split(",")):
            target, colon, name = part.rpartition(":")
            if name not in known:
                raise UsageError(f"{option}={part!r}: there is no packing format {name!r}; {nearest(name, known)}")
            if colon and target not in owners:
                raise UsageError(f"{option}={part!r}: there is no target {target!r}; {nearest(target, owners)}")
            if colon:
                _check_format(option, name, target)
            found[target if colon else None] = name
        return found

    def packing_format(self, target: str, encoder: bool = False) -> str:
        """The packing format for ``target``.

        Raises:
            ValueError: the target does not have it.
        """
        found = self.packing_formats(encoder)
        name = found.get(target, found.get(None, AUTO))
        _check_format("qlinear_packing_format" + ("_encoder" if encoder else ""), name, target)
        return name


def _check_format(option: str, name: str, target: str) -> None:
    if name in (AUTO, *formats(target)):
        return
    owners = " or ".join(f"{each}:{name}" for each in own_targets() if name in formats(each))
    raise UsageError(
        f"{option}={name!r} is not for {target}, which has {', '.join((AUTO, *formats(target)))}; write {owners} to "
        "choose it for that target alone"
    )


def split_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in "cuda,xnnpack", or in a sequence of names: of this package, or of entry points of others.

    Raises:
        ValueError: a target is unknown.
    """
    if target is None:
        return ()
    names = target.split(",") if isinstance(target, str) else list(target)
    names = [name.strip() if isinstance(name, str) else name for name in names]
    for name in names:
        if name in targets():
            continue
        if ":" in str(name):
            raise UsageError(
                f"target {name!r}: models are quantized and exported for targets that have a name: give this one an "
                "entry point in the group et_cuda_passes.targets"
            )
        raise UsageError(f"there is no target {name!r}; {nearest(str(name), targets())}")
    return tuple(dict.fromkeys(names))


# Targets --------------------------------------------------------------------------------------------------------------


def promised_targets(options: QuantizationOptions) -> frozenset[str]:
    """The targets that must have a kernel for every layer, by a scheme such as "cuda:4w"."""
    return frozenset(scheme.promised for scheme, _ in options.schemes().values() if scheme.promised is not None)


def expected_counts(options: QuantizationOptions, target: str) -> dict[str, int] | None:
    """The counts for ``expect=`` of a rewrite for ``target``: none missed or folded if a scheme promises that."""
    if target not in promised_targets(options):
        return None
    names = [each.name for each in passes_for(options, target)]
    fold = FoldDequantize().name
    return {"missed": 0} | ({fold: 0} if fold in names else {})


def passes_for(options: QuantizationOptions, target: str, encoder: bool = False) -> PassList:
    """The target's pass list with the options' packing format, ``cast_to_bf16`` and ``xnnpack_weight_only``.

    Raises:
        ValueError: the packing format is not one of the target's.
    """
    passes = passes_with(target, options.packing_format(target, encoder), options.cast_to_bf16)
    if target == "xnnpack" and options.xnnpack_weight_only == "dynamic-activation":
        passes = passes.insert_before(ShareActivation.name, QuantizeActivation())
    return passes


def check_weight_only(choice: str, names: Sequence[str]) -> None:
    """Check the option ``xnnpack_weight_only`` of an export for the targets ``names``.

    Raises:
        ValueError: it has another value than the default, and xnnpack is none of the targets.
    """
    if choice != "fold" and "xnnpack" not in names:
        raise UsageError(
            f"xnnpack_weight_only={choice!r} changes programs for xnnpack, and the target is {', '.join(names)}: add "
            "xnnpack to the target, or leave the option out"
        )


def dtype_problem(dtype: torch.dtype, names: Sequence[str], cast_to_bf16: bool) -> str:
    """Why the targets ``names`` cannot run a model in ``dtype``, with the fix; empty if they can."""
    refusing = [name for name in names if not takes_dtype(name, dtype)]
    if not refusing:
        return ""
    others = [] if cast_to_bf16 else [name for name in names if casts_to_bf16(name)]
    cast = f" and give cast_to_bf16=True, by which {' and '.join(others)} cast to bfloat16" if others else ""
    lacking = " and ".join(refusing)
    return (
        f"{lacking} compute{'s' if len(refusing) == 1 else ''} in float32: load the model with "
        f"dtype=torch.float32{cast}, or leave {lacking} out of the targets"
    )


def check_schemes(options: QuantizationOptions, target: str | Sequence[str] | None = None) -> None:
    """Check that the schemes, the packing formats and the targets go together.

    Args:
        options: the options.
        target: all targets of the export; None for those of the options.

    Raises:
        ValueError: they do not; the message contains the nearest valid choices.
    """
    names = options.targets if target is None else split_targets(target)
    if options.cast_to_bf16 and names and not any(map(casts_to_bf16, names)):
        usable = " or ".join(filter(casts_to_bf16, own_targets()))
        raise UsageError(
            f"cast_to_bf16=True is for kernels of {usable}, and the target is {', '.join(names)}: leave it out"
        )
    _check_targets(options, names)


def refused_targets(options: QuantizationOptions) -> dict[str, str]:
    """The targets of the options that cannot take their schemes, each with the reason; empty if none or all cannot."""
    promised, refused = promised_targets(options), {}
    for name in options.targets:
        try:
            _check_targets(options, [*(each for each in options.targets if each in promised and each != name), name])
        except UsageError as error:
            refused[name] = str(error)
    return refused if len(refused) < len(options.targets) else {}


def folded_targets(options: QuantizationOptions) -> dict[str, str]:
    """The targets of the options that compute with floating-point weights for a scheme, each with the reason."""
    found: dict[str, list[tuple[str, Scheme]]] = {}
    for place, (scheme, embedding) in options.schemes().items():
        for name in options.targets:
            if not embedding and options.quantizes_activations_of(scheme, name):
                continue
            if usual_support(scheme, name, kind="embedding" if embedding else "linear").status is Status.FOLDED:
                found.setdefault(name, []).append((place, scheme))
    folded = {}
    for name, ((place, scheme), *others) in found.items():
        more = f" and {len(others)} more" if others else ""
        folded[name] = f"{place}={scheme}{more}: it computes with floating-point weights; {instead(scheme, name)}"
    return folded


def _check_targets(options: QuantizationOptions, names: Sequence[str]) -> None:
    """Check that each target has the schemes, the packing formats and the group sizes.

    Raises:
        UsageError: one of them has not.
    """
    for place, (scheme, embedding) in options.schemes().items():
        both = embedding is None and scheme.name in FOR_EMBEDDINGS
        kinds = ("linear", "embedding") if both else ("embedding" if embedding else "linear",)
        _check_promise(place, scheme, names)
        for name in names or ((scheme.promised,) if scheme.promised else ()):
            statuses = [usual_support(scheme, name, kind=kind).status for kind in kinds]
            # A recipe's pattern may match linears and embeddings: the plan knows which.
            _check_status(place, scheme, name, min(statuses, key=list(Status).index))
    for encoder in (False, True):
        for name in names:
            _check_packing_format(options, name, encoder)
        _check_group_size(options, names, encoder)


def _check_promise(place: str, scheme: Scheme, names: Sequence[str]) -> None:
    """The promised target is one of those that are named."""
    if not names or scheme.promised is None or scheme.promised in names:
        return
    same = [name for name in names if scheme.only_for is None and usual_support(scheme, name).status.has_kernel]
    nearest_choices = [f"write {' or '.join(f'{name}:{scheme.name}' for name in same)}"] if same else []
    raise UsageError(
        f"{place}={scheme} promises kernels of {scheme.promised}, and the target is {', '.join(names)}; "
        + "; ".join([*nearest_choices, *(instead(scheme, name) for name in names)])
    )


def _check_status(place: str, scheme: Scheme, target: str, status: Status) -> None:
    """The target has a rule for the scheme, and a kernel if the scheme promises one."""
    if status is Status.IMPOSSIBLE:
        raise UsageError(f"{place}={scheme}: {target} has no kernel for {scheme.name}; {instead(scheme, target)}")
    if target == scheme.promised and not status.has_kernel:
        raise UsageError(
            f"{place}={scheme}: {target} has no kernel for {scheme.name} and computes with floating-point weights; "
            f"{instead(scheme, target)}"
        )


def _check_packing_format(options: QuantizationOptions, target: str, encoder: bool) -> None:
    """The target has the format, and its kernel has the scheme and the group size."""
    layout, scheme = options.packing_format(target, encoder), options.linear_scheme(encoder)
    if layout == AUTO or scheme is None:
        return
    if scheme.bits > 4:
        usable = ", ".join(each.name for each in SCHEMES.values() if each.bits == 4 and each.only_for is None)
        raise UsageError(
            f"the packing format {layout} holds 4-bit weights, and {scheme} has {scheme.bits} bits; use one of "
            f"{usable}, or leave the packing format out"
        )
    size = options.group_size(False, encoder)
    # in_features that are large enough, and that the group size divides.
    if layout not in support(scheme, size, max(1024, 32 * size), target, layout).layouts:
        usable = ", ".join(
            str(each) for each in _SUGGESTED if layout in support(scheme, each, 1024, target, layout).layouts
        )
        raise UsageError(
            f"the packing format {layout} of {target} has no kernel for groups of {size}; it has one for groups of "
            f"{usable}"
        )


def _check_group_size(options: QuantizationOptions, names: Sequence[str], encoder: bool) -> None:
    """Every target has a kernel for 4-bit groups of this size, whatever in_features is.

    Groups of 8-bit weights are adjusted to one scale per row for a target that has only that.
    """
    scheme, size = options.linear_scheme(encoder), options.group_size(False, encoder)
    option = "qlinear_group_size" + ("_encoder" if encoder else "")
    if scheme is not None and scheme.per_row and size not in (DEFAULT_GROUP_SIZE, PER_AXIS):
        raise UsageError(f"{option}={size}: {scheme.name} has one scale per row; leave the group size out, or write 0")
    if scheme is None or size == PER_AXIS or scheme.bits > 4:
        return

    def lacks(size: int, k: int, name: str) -> bool:
        found = support(scheme, size, k, name)
        return found.plain or found.status is Status.IMPOSSIBLE

    for name in names:
        if lacks(size, 32 * size, name):
            usable = [each for each in _SUGGESTED if not lacks(each, 1024, name)]
            usable.sort(key=lambda each: abs(each - size))
            raise UsageError(
                f"{option}={size}: {name} has no kernel of {scheme.name} for groups of {size}; the nearest that it has "
                f"are {', '.join(map(str, usable[:2]))}"
            )
