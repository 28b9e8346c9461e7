"""The networks' sizes, and the minimum cost of a call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dimensions:
    """Sizes of both networks and of the inputs that they are measured with.

    Attributes:
        mel, frames: sizes of the spectrogram; the second convolution halves the frames into positions.
        audio_features, audio_heads, audio_hidden, audio_layers: sizes of the encoder; ``audio_hidden`` is also the
            number of features of consecutive positions that the projector joins.
        features, hidden, layers: sizes of the decoder.
        heads, kv_heads, head_dim: sizes of its attention.
        vocabulary: number of tokens.
        cache: positions in the KV cache.
        prompt: tokens of the prompt; 375 of the audio and 13 around them.
        steps: number of decoded tokens whose logits are compared.
    """

    mel: int = 128
    frames: int = 3000
    audio_features: int = 1280
    audio_heads: int = 20
    audio_hidden: int = 5120
    audio_layers: int = 32
    features: int = 3072
    hidden: int = 8192
    layers: int = 30
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 131072
    cache: int = 1024
    prompt: int = 388
    steps: int = 8

    @property
    def positions(self) -> int:
        """Positions that the encoder attends over."""
        return self.frames // 2

    @property
    def audio_tokens(self) -> int:
        """Number of embeddings of the projector."""
        return self.positions * self.audio_features // self.audio_hidden

    @property
    def linears(self) -> dict[str, int]:
        """Number of linears of each method."""
        return {"audio_encoder": 6 * self.audio_layers + 2, "token_embedding": 0, "text_decoder": 7 * self.layers + 1}

    @property
    def linear_weights(self) -> dict[str, int]:
        """Elements of the weights of the linears of each method."""
        audio = self.audio_features * (4 * self.audio_features + 2 * self.audio_hidden)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        text = self.features * (2 * queries + 2 * keys + 3 * self.hidden)
        return {
            "audio_encoder": self.audio_layers * audio + self.features * (self.audio_hidden + self.features),
            "token_embedding": 0,
            "text_decoder": self.layers * text + self.vocabulary * self.features,
        }

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the large tensors in bf16: the linears, the embedding and the KV cache."""
        cache = 2 * self.layers * self.kv_heads * self.head_dim * self.cache
        return 2 * (sum(self.linear_weights.values()) + self.vocabulary * self.features + cache)

    @property
    def flops(self) -> dict[str, float]:
        """Operations of each measured case: two for each weight and row; causal attention counts half."""
        projector = self.features * (self.audio_hidden + self.features)
        tower = self.linear_weights["audio_encoder"] - projector
        front = 3 * self.audio_features * (self.frames * self.mel + self.positions * self.audio_features)
        audio_attention = 2 * self.audio_layers * self.positions**2 * self.audio_features
        text, width = self.linear_weights["text_decoder"], self.layers * self.heads * self.head_dim
        return {
            "audio_encoder": 2.0 * (tower * self.positions + projector * self.audio_tokens + front + audio_attention),
            "token_embedding": 0.0,
            "prefill": 2.0 * (text * self.prompt + width * self.prompt**2),
            "decode": 2.0 * (text + 2 * width * (self.prompt + 1)),
        }


SCALES = {
    "full": Dimensions(),
    # Heads have the real widths, which determine the attention's kernels; other sizes are the least of the int4
    # kernels.
    "tiny": Dimensions(
        mel=32,
        frames=96,
        audio_features=128,
        audio_heads=2,
        audio_hidden=512,
        audio_layers=2,
        features=256,
        hidden=512,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=1024,
        cache=64,
        prompt=20,
    ),
}
