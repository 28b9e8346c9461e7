"""The three methods as exported programs."""

import torch
from torch.export import Dim, ExportedProgram

from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.model import Voxtral


def export(model: Voxtral, dimensions: Dimensions, hint: int) -> dict[str, ExportedProgram]:
    """The methods of ``model``, on its device and in its dtype.

    Args:
        model: from :func:`~benchmarks.voxtral.weights.build`.
        dimensions: its sizes.
        hint: length of the example, 2 or more; the lowering tunes dynamic lengths for it.
    """
    weight = model.token_embedding.embed_tokens.weight
    at = torch.arange(hint, device=weight.device)
    text, tokens = (Dim(name, min=1, max=dimensions.cache) for name in ("length", "tokens"))
    with torch.no_grad():
        return {
            "audio_encoder": torch.export.export(
                model.audio_encoder, (weight.new_zeros(1, dimensions.mel, dimensions.frames),)
            ),
            "token_embedding": torch.export.export(
                model.token_embedding,
                (at[None],),
                dynamic_shapes=({1: tokens},),
            ),
            "text_decoder": torch.export.export(
                model.text_decoder,
                (weight.new_zeros(1, hint, dimensions.features), at),
                dynamic_shapes=({1: text}, {0: text}),
            ),
        }
