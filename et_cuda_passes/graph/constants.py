"""Constants across methods: packed once from the same sources, and named after the weight they come from."""

from collections.abc import Callable, Hashable

import torch


class ConstantPool:
    """Packed constants by source and layout, so that what methods share is packed and stored once.

    The sources are held alive: a freed tensor's address could come back as another tensor's.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[str, torch.Tensor, tuple[torch.Tensor, ...]]] = {}

    def get(
        self, fqn: str, sources: tuple[torch.Tensor, ...], layout: Hashable, make: Callable[[], torch.Tensor]
    ) -> tuple[str, torch.Tensor]:
        """The FQN and tensor for ``layout`` of ``sources``; made, and named ``fqn``, the first time."""
        key = (tuple(_identity(source) for source in sources), layout)
        if key not in self._entries:
            self._entries[key] = (fqn, make(), sources)
        name, tensor, _ = self._entries[key]
        return name, tensor


def _identity(tensor: torch.Tensor) -> Hashable:
    return (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())


def unparametrized(target: str) -> str:
    """``l.weight`` of ``l.parametrizations.weight.original0``; any other name as it is."""
    parts = target.split(".")
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1].startswith("original"):
        return ".".join((*parts[:-3], parts[-2]))
    return target
