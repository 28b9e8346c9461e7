"""The encoders of a model, by the methods and names that transformers gives its models."""

from collections.abc import Mapping
from typing import Any

from torch import nn

_MODALITIES = ("image", "video", "audio")
_LANGUAGE_MODELS = ("text_config", "decoder", "generator")
"""Names of the configuration of a language model within that of a larger model."""
_PROJECTORS = ("multi_modal_projector", "projector", "connector", "encoder_projector")
"""Names of the modules that convert the encoder's features to the size of the language model, after the encoder."""


def encoder_fqns(model: nn.Module) -> tuple[str, ...]:
    """The FQNs of the encoders: that of an encoder-decoder, or the image and audio encoders of a language model.

    A model that is an encoder as a whole has none: then nothing beside the encoder is left.
    """
    found: dict[str, None] = {}
    for prefix, owner in _owners(model):
        names = {module: fqn for fqn, module in owner.named_modules()}
        encoders = [fqn for fqn in _encoders(owner, names) if fqn]
        parents = {fqn.rpartition(".")[0] for fqn in encoders}
        for fqn in names.values():
            parent, _, name = fqn.rpartition(".")
            if fqn in encoders or (name in _PROJECTORS and parent in parents):
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


def _encoders(owner: Any, names: Mapping[nn.Module, str]) -> list[str]:
    """The FQNs of what ``get_encoder`` of a model of transformers finds; empty for the model itself."""
    config = owner.config
    # Without one of these, the model is an encoder as a whole, or a decoder.
    has_language_model = any(getattr(config, name, None) is not None for name in _LANGUAGE_MODELS)
    if not has_language_model and not getattr(config, "is_encoder_decoder", False):
        return []
    first = names.get(owner.get_encoder(), "")
    # A decoder without an encoder returns itself, in a larger model too.
    found = [first] if first.endswith("encoder") else []
    if has_language_model:
        found += [names.get(owner.get_encoder(modality=modality), "") for modality in _MODALITIES]
    return found


def _join(prefix: str, fqn: str) -> str:
    return f"{prefix}.{fqn}" if prefix and fqn else prefix or fqn
