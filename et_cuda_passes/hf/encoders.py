"""The encoders of a model, by the methods and names that transformers gives its models."""

from typing import Any

from torch import nn

_MODALITIES = ("image", "video", "audio")
_PROJECTORS = ("multi_modal_projector", "projector", "connector", "encoder_projector")
"""Names of the modules that convert the encoder's features to the size of the language model, after the encoder."""


def encoder_fqns(model: nn.Module) -> tuple[str, ...]:
    """The FQNs of the encoders: that of an encoder-decoder, or the image and audio encoders of a language model.

    A model that is an encoder as a whole has none: then nothing beside the encoder is left.
    """
    found: dict[str, None] = {}
    for prefix, owner in _owners(model):
        names = {module: fqn for fqn, module in owner.named_modules()}
        encoders = [module for module in _encoders(owner) if module in names and module is not owner]
        for module in encoders:
            found[_join(prefix, names[module])] = None
        for fqn, _ in owner.named_modules():
            if fqn.rpartition(".")[2] in _PROJECTORS and encoders and _is_sibling(fqn, [names[m] for m in encoders]):
                found[_join(prefix, fqn)] = None
    return tuple(found)


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules that have a ``get_encoder`` and a ``config``, with their FQNs."""
    found: list[tuple[str, nn.Module]] = []
    for fqn, module in model.named_modules():
        inside = any(prefix == "" or fqn.startswith(f"{prefix}.") for prefix, _ in found)
        if not inside and callable(getattr(module, "get_encoder", None)) and hasattr(module, "config"):
            found.append((fqn, module))
    return found


def _encoders(owner: Any) -> list[nn.Module]:
    """The encoders of a model of transformers, as its ``get_encoder`` finds them."""
    config = owner.config
    if getattr(config, "is_encoder_decoder", False):
        return [owner.get_encoder()]
    if all(getattr(config, name, None) is None for name in ("text_config", "decoder", "generator")):
        return []
    return [owner.get_encoder(modality=modality) for modality in _MODALITIES]


def _is_sibling(fqn: str, others: list[str]) -> bool:
    return any(fqn.rpartition(".")[0] == other.rpartition(".")[0] for other in others)


def _join(prefix: str, fqn: str) -> str:
    return f"{prefix}.{fqn}" if prefix and fqn else prefix or fqn
