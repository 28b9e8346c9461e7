"""Random inputs for a component of an export: at the shortest and the longest size that its signature allows, and
between.

Tokens are in the vocabulary, positions count up, masks are causal, and a cache of a fixed size is filled in part, so
that the component computes with them what it computes when it generates.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.exporters.metadata import ExportMetadata, load_treespec

from et_cuda_passes.executorch.archive_expression import check_expression
from et_cuda_passes.hf.artifact import Component, ExportError, Input

_TOKENS = ("input_ids", "decoder_input_ids", "input")
_CACHE = "past_key_values"
_FEWEST_TOKENS = 4
"""The number of different tokens that a text must have to be used."""
_MOST = 1 << 30
"""The largest number of elements of an input. A larger one is no size that a user means."""


@dataclass(frozen=True)
class Case:
    """The sizes of one call.

    Attributes:
        sizes: by the name of a dynamic size.
        past: the number of tokens that a cache of a fixed size holds; None if the component has no such cache.
    """

    sizes: Mapping[str, int]
    past: int | None = None

    def __str__(self) -> str:
        parts = [f"{name}={size}" for name, size in self.sizes.items()]
        if self.past is not None:
            parts.append(f"{self.past} token{'s' if self.past != 1 else ''} in the cache")
        return ", ".join(parts) or "its one size"


class Samples:
    """Draws inputs for a component.

    Args:
        component: has the signature.
        metadata: has the names of the kwargs.
        config: of the model, for the size of the vocabulary; None if the export has none.
        text: tokens of a text, which is repeated; without it tokens are random. A model rounds more for random tokens.
    """

    def __init__(
        self, component: Component, metadata: ExportMetadata, config: Any = None, text: Sequence[int] = ()
    ) -> None:
        self._signature, self._metadata = component.signature, metadata
        spec = load_treespec(metadata.in_spec).children()[1]
        self._names = [
            name for name, child in zip(spec.context, spec.children(), strict=True) for _ in range(child.num_leaves)
        ]
        inner = config.get_text_config(decoder=True) if config is not None else None
        self._vocabulary = int(getattr(inner, "vocab_size", None) or 2)
        self._positions = getattr(inner, "max_position_embeddings", None)
        tokens = [token for token in text if token < self._vocabulary]
        # A tokenizer that knows none of the words has one token for all, of which a model may compute zeros.
        self._text = torch.tensor(tokens if len({*tokens}) >= _FEWEST_TOKENS else [], dtype=torch.int64)

    def cases(self) -> list[Case]:
        """The shortest and the longest call that the signature allows, and one between."""
        bounds = self._bounds()
        capacity = self._capacity()
        found = []
        for part in (0.0, 0.5, 1.0):
            sizes = {name: low + int((high - low) * part) for name, (low, high) in bounds.items()}
            # One place is for the token that the call adds.
            found.append(Case(sizes, None if capacity is None else 1 + int((capacity - 2) * part)))
        return [case for index, case in enumerate(found) if case not in found[:index]]

    def draw(self, case: Case, generator: torch.Generator) -> list[Any]:
        """The leaves of the inputs.

        Raises:
            ExportError: an input would be too large, or of a dtype that has no random numbers.
        """
        return [
            spec.constant if spec.dtype is None else self._tensor(name, spec, case, generator)
            for name, spec in zip(self._names, self._signature.inputs, strict=True)
        ]

    def length_case(self, length: int) -> Case | None:
        """The shortest call with ``length`` tokens of text; None if the signature does not allow it."""
        bounds = self._bounds()
        for name, spec in zip(self._names, self._signature.inputs, strict=True):
            if name in _TOKENS:
                size = spec.shape[-1]
                low, high = bounds.get(str(size), (size, size))
                if not isinstance(low, int) or not isinstance(high, int) or not low <= length <= high:
                    return None
                return Case({each: length if each == size else low for each, (low, _) in bounds.items()})
        return None

    def with_cache(self, leaves: list[Any], outputs: Any) -> list[Any]:
        """``leaves`` with the cache in the outputs of another component, where it has the same structure.

        Args:
            leaves: from :meth:`draw`.
            outputs: what the other component returns.
        """
        cache = tree_leaves(getattr(outputs, _CACHE, None))
        places = [place for place, name in enumerate(self._names) if name == _CACHE]
        if [_kind(leaf) for leaf in cache] != [_kind(leaves[place]) for place in places]:
            return leaves
        filled = list(leaves)
        for place, leaf in zip(places, cache, strict=True):
            filled[place] = leaf.clone() if isinstance(leaf, Tensor) else leaf
        return filled

    def _bounds(self) -> dict[str, tuple[int, int]]:
        """The least and the greatest value of each dynamic size. A size without limit ends at four times the traced."""
        found = {}
        for name in sorted(_symbols(size for spec in self._signature.inputs for size in spec.shape)):
            low, high = self._signature.ranges.get(name, (1, None))
            # torch.export writes 2 for sizes that may be 1.
            low = 1 if low <= 2 else low
            found[name] = (low, max(low, 4 * self._traced(name)) if high is None else high)
        return found

    def _traced(self, name: str) -> int:
        """The size that ``name`` had when the component was traced; 8 if that is not recorded."""
        for kwarg, spec in zip(self._names, self._signature.inputs, strict=True):
            shape = self._metadata.kwargs.get(kwarg, {}).get("shape")
            if shape is not None and name in spec.shape and len(shape) == len(spec.shape):
                return int(shape[spec.shape.index(name)])
        return 8

    def _capacity(self) -> int | None:
        """The number of tokens for which the cache has room; None if it is not of a fixed size, or not filled yet."""
        cache = [spec for name, spec in zip(self._names, self._signature.inputs, strict=True) if name == _CACHE]
        if not any(spec.dtype is not None and "int" in spec.dtype for spec in cache):
            return None
        lengths = [spec.shape[-2] for spec in cache if len(spec.shape) == 4]
        fixed = [length for length in lengths if isinstance(length, int) and length > 1]
        return min(fixed, default=None)

    def _tensor(self, name: str, spec: Input, case: Case, generator: torch.Generator) -> Tensor:
        shape = tuple(_evaluated(size, case.sizes) for size in spec.shape)
        dtype = getattr(torch, spec.dtype or "")
        if torch.Size(shape).numel() > _MOST:
            raise ExportError(f"{spec.name} would have the shape {list(shape)}: give inputs of the intended size")
        if "mask" in name:
            return self._mask(shape, dtype, case)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        if dtype.is_complex:
            raise ExportError(f"random inputs of {spec.dtype} are not supported, and {spec.name} has it: give inputs")
        if name == _CACHE:
            return torch.full(shape, case.past or 0, dtype=dtype)
        if "position" in name and shape:
            return self._counted(shape, case).to(dtype)
        if name in _TOKENS and self._text.numel() and len(shape) == 2:
            # Each row begins elsewhere in the text, and after the tokens in the cache.
            places = torch.arange(shape[0])[:, None] + torch.arange(shape[1]) + (case.past or 0)
            return self._text[places % self._text.numel()].to(dtype)
        high = self._vocabulary if name in _TOKENS else 2
        return torch.randint(0, high, shape, generator=generator).to(dtype)

    def _counted(self, shape: tuple[int, ...], case: Case) -> Tensor:
        past = case.past or 0
        positions = torch.arange(past, past + shape[-1])
        if self._positions is not None:
            positions = positions.clamp(max=self._positions - 1)
        return positions.expand(shape).contiguous()

    def _mask(self, shape: tuple[int, ...], dtype: torch.dtype, case: Case) -> Tensor:
        """All tokens for a mask of tokens; for one of pairs, those that a causal model sees."""
        visible = torch.ones(shape, dtype=torch.bool)
        if len(shape) == 4:
            rows, columns = shape[-2:]
            past = max(columns - rows, 0) if case.past is None else case.past
            visible = torch.arange(columns) <= past + torch.arange(rows)[:, None]
            visible = visible.expand(shape).contiguous()
            if dtype.is_floating_point:
                return torch.zeros(shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        return visible.to(dtype)


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, leaf.shape) if isinstance(leaf, Tensor) else leaf


def _symbols(sizes: Iterable[int | str]) -> set[str]:
    """The names in the texts of dynamic sizes."""
    found: set[str] = set()
    for size in sizes:
        if isinstance(size, str):
            found.update(re.findall(r"\b[su]\d+\b", size))
    return found


def _evaluated(size: int | str, sizes: Mapping[str, int]) -> int:
    """The value of a size, which may be an expression such as "s70 + 1"."""
    if not isinstance(size, str):
        return size
    if size not in sizes:
        # sympy evaluates texts as Python.
        check_expression(size, "a size of an input")
        return int(sympy.sympify(size, locals={name: sympy.Integer(value) for name, value in sizes.items()}))
    return sizes[size]
