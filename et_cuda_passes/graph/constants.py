"""Constants across methods: packed once from the same sources, and named after the weight they come from."""

import itertools
from collections.abc import Callable, Hashable, Iterable

import torch


class ConstantCache:
    """Packed constants by source and layout, so that what methods share is packed and stored once.

    The sources are held alive: a freed tensor's address could come back as another tensor's. What is written to them
    between two rewrites is packed anew.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[str, torch.Tensor, tuple[torch.Tensor, ...], list[int]]] = {}
        self._names: set[str] = set()

    def get(
        self, fqn: str, sources: tuple[torch.Tensor | None, ...], layout: Hashable, make: Callable[[], torch.Tensor]
    ) -> tuple[str, torch.Tensor]:
        """The FQN and tensor for ``layout`` of ``sources``; made, and named ``fqn``, the first time.

        Another constant under the same FQN (one tensor of integers read with two scales) is ``<fqn>_2``, and so on.

        Raises:
            TypeError: a source is None, being no constant of the program, or there is none; or no tensor was made.
        """
        held = tuple(source for source in sources if source is not None)
        if not held or len(held) < len(sources):
            raise TypeError(
                f"{fqn} has no sources, or some that are no constants of the program, by which it is told from other "
                "constants: those of a quantized weight are weight_of(m).sources"
            )
        key = (tuple(map(tensor_identity, held)), layout)
        if key not in self._entries or _versions(self._entries[key][2]) != self._entries[key][3]:
            names = (fqn if number == 1 else f"{fqn}_{number}" for number in itertools.count(1))
            name = next(name for name in names if name not in self._names)
            made: object = make()
            if not isinstance(made, torch.Tensor):
                raise TypeError(f"what was to make {fqn} returned {made!r}, which is no tensor")
            self._names.add(name)
            self._entries[key] = (name, made, held, _versions(held))
        name, tensor, *_ = self._entries[key]
        return name, tensor


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How often the memory of each was written in place; an inference tensor's is not counted."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def tensor_identity(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one: the same memory read in the same way, or the same subclass object."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())


def strip_parametrization(target: str) -> str:
    """``l.weight`` of ``l.parametrizations.weight.original0``; any other name as it is."""
    parts = target.split(".")
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1].startswith("original"):
        return ".".join((*parts[:-3], parts[-2]))
    return target
