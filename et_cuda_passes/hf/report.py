"""The report of a quantization: an entry for each linear, each stack of experts and each embedding."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """How a layer is quantized, or why it is not.

    Attributes:
        fqn: of the module; of the parameter if ``kind`` is "experts" or "other".
        kind: "linear", "embedding", "experts" for the stacked matrices of a mixture of experts, or "other" for a matrix
            of another module, which stays floating-point.
        out_features: N, the rows of the weight.
        in_features: K, its columns.
        encoder: whether the layer is a part of an encoder, to which the options with ``_encoder`` apply.
        scheme: the name of the scheme, or None if the weight is as it was.
        group_size: along in_features, 0 for one scale per row; None without a scheme.
        algorithm: how the scales are chosen.
        adjusted_from: the group size of the options, if another one is used or a scheme without one.
        reason: why the group size is another one, or why the weight is as it was.
        pattern: the pattern of the recipe that decides about the layer.
        tied_to: the other layers that share the weight.
        experts: the number of matrices in a stack; 1 for a matrix.
    """

    fqn: str
    kind: str
    out_features: int
    in_features: int
    encoder: bool = False
    scheme: str | None = None
    group_size: int | None = None
    algorithm: str | None = None
    adjusted_from: int | None = None
    reason: str = ""
    pattern: str | None = None
    tied_to: tuple[str, ...] = ()
    experts: int = 1

    @property
    def form(self) -> str:
        """Scheme and group size in words, such as "4w group 32"; "float" without a scheme."""
        if self.scheme is None:
            return "float"
        return f"{self.scheme} group {self.group_size}" if self.group_size else f"{self.scheme} per axis"


@dataclass
class QuantizationReport:
    """The entries of a quantization, in the model's order.

    Attributes:
        layers: one for each linear, embedding, stack of experts and other matrix.
        warnings: what the user probably did not intend.
    """

    layers: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, fqn: str) -> LayerReport:
        """The entry of the layer with that FQN.

        Raises:
            KeyError: no layer has that FQN.
        """
        for layer in self.layers:
            if layer.fqn == fqn:
                return layer
        raise KeyError(fqn)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, in a fixed order."""
        layers = [asdict(layer) | {"tied_to": list(layer.tied_to)} for layer in self.layers]
        return {"layers": layers, "warnings": list(self.warnings)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "QuantizationReport":
        """The inverse of :meth:`to_dict`."""
        layers = [LayerReport(**{**layer, "tied_to": tuple(layer["tied_to"])}) for layer in data["layers"]]
        return QuantizationReport(layers, list(data["warnings"]))

    def __str__(self) -> str:
        """A short text: how many layers have each scheme, and every reason with its layers."""
        total = Counter(layer.kind for layer in self.layers)
        quantized = sum(layer.scheme is not None for layer in self.layers)
        counts = ", ".join(f"{count} x {kind}" for kind, count in total.items())
        lines = [f"quantized {quantized} of {len(self.layers)} layers ({counts or 'none'})"]
        groups: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self.layers:
            why = "" if not layer.reason else f"{layer.reason}"
            pattern = "" if layer.pattern is None else f"recipe pattern {layer.pattern}"
            tied = f"one weight with {', '.join(layer.tied_to)}" if layer.tied_to else ""
            groups.setdefault((layer.form, layer.kind, why, pattern, tied), []).append(layer)
        for (form, kind, *notes), layers in groups.items():
            more = ", ..." if len(layers) > 1 else ""
            lines.append(f"  {form:<16} {len(layers):>5} x {kind}  ({layers[0].fqn}{more})")
            lines += [f"            {note}" for note in notes if note]
        lines += [f"  warning   {warning}" for warning in self.warnings]
        return "\n".join(lines)
