"""The two networks, with the names and the arithmetic of transformers' Voxtral, written for torch.export.

``text_decoder`` returns the logits of every position, [1, L, vocabulary], like the exports of Voxtral for ExecuTorch's
runner, which reads the last one. At 388 tokens the other 387 cost a tenth of the multiplications. Queries share keys in
attention (``enable_gqa``), where transformers repeats the keys: the numbers are equal, with fewer copies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.voxtral.dimensions import Dimensions

EPSILON = 1e-5
ROPE_BASE = 1e8


class AudioAttention(nn.Module):
    """Attention of every position to every other."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.heads = d.audio_heads
        self.k_proj = nn.Linear(d.audio_features, d.audio_features, bias=False)
        self.v_proj = nn.Linear(d.audio_features, d.audio_features)
        self.q_proj = nn.Linear(d.audio_features, d.audio_features)
        self.out_proj = nn.Linear(d.audio_features, d.audio_features)

    def forward(self, x: Tensor) -> Tensor:
        """X [1, positions, audio_features] -> the same shape."""
        q, k, v = (
            projection(x).view(1, x.shape[1], self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return y


class AudioLayer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.self_attn = AudioAttention(d)
        self.self_attn_layer_norm = nn.LayerNorm(d.audio_features)
        self.fc1 = nn.Linear(d.audio_features, d.audio_hidden)
        self.fc2 = nn.Linear(d.audio_hidden, d.audio_features)
        self.final_layer_norm = nn.LayerNorm(d.audio_features)

    def forward(self, x: Tensor) -> Tensor:
        """X [1, positions, audio_features] -> the same shape."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        y: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x + y


class AudioTower(nn.Module):
    """Whisper's encoder."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(d.mel, d.audio_features, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d.audio_features, d.audio_features, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(d.positions, d.audio_features)
        self.layers = nn.ModuleList(AudioLayer(d) for _ in range(d.audio_layers))
        self.layer_norm = nn.LayerNorm(d.audio_features)

    def forward(self, mel: Tensor) -> Tensor:
        """Mel [1, mel, frames] -> [1, positions, audio_features]."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2) + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.layer_norm(x)
        return y


class Projector(nn.Module):
    """Four positions of audio to an embedding of text."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(d.audio_hidden, d.features, bias=False)
        self.linear_2 = nn.Linear(d.features, d.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., audio_hidden] -> [..., features]."""
        y: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return y


class AudioEncoder(nn.Module):
    """The method ``audio_encoder``: mel [1, mel, frames] -> [1, audio_tokens, features]."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.audio_tower = AudioTower(d)
        self.multi_modal_projector = Projector(d)
        self.grouped = (1, d.audio_tokens, d.audio_hidden)

    def forward(self, mel: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.multi_modal_projector(self.audio_tower(mel).reshape(self.grouped))
        return y


class RmsNorm(nn.Module):
    """Llama's norm in plain operators: not every version of Inductor decomposes the operator of torch's own norm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., features] -> the same shape; the mean is in fp32."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        scaled: Tensor = self.weight * normal.to(x.dtype)
        return scaled


class Rotary(nn.Module):
    """Cosines and sines of positions."""

    inverse_frequencies: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inverse_frequencies", torch.empty(head_dim // 2), persistent=False)

    def frequencies(self, device: torch.device) -> Tensor:
        """The value of the buffer: fp32 [head_dim / 2]."""
        return ROPE_BASE ** -(torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions int64 [L] -> two [L, head_dim], computed in fp32."""
        angles = positions[:, None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [1, heads, L, head_dim] rotated by each position's angles; the elements of a pair are half the width apart."""
    # Slices, since ExecuTorch's verifier rejects split, and so chunk.
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class TextAttention(nn.Module):
    """Attention to the cache, after the keys and values of these positions are written to it."""

    keys: Tensor
    values: Tensor

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.head_dim = d.head_dim
        self.q_proj = nn.Linear(d.features, d.heads * d.head_dim, bias=False)
        self.k_proj = nn.Linear(d.features, d.kv_heads * d.head_dim, bias=False)
        self.v_proj = nn.Linear(d.features, d.kv_heads * d.head_dim, bias=False)
        self.o_proj = nn.Linear(d.heads * d.head_dim, d.features, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, d.kv_heads, d.cache, d.head_dim), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """X [1, L, features] -> the same shape; mask bool [1, 1, L, cache]."""
        q, k, v = (
            projection(x).view(1, x.shape[1], -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        self.keys.index_copy_(2, positions, rotate(k, cos, sin))
        self.values.index_copy_(2, positions, v)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), self.keys, self.values, attn_mask=mask, enable_gqa=True)
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(1, x.shape[1], -1))
        return projected


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d.features, d.hidden, bias=False)
        self.up_proj = nn.Linear(d.features, d.hidden, bias=False)
        self.down_proj = nn.Linear(d.hidden, d.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., features] -> the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class TextLayer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.self_attn = TextAttention(d)
        self.mlp = Mlp(d)
        self.input_layernorm = RmsNorm(d.features)
        self.post_attention_layernorm = RmsNorm(d.features)

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        """X [1, L, features] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), *where)
        y: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + y


class LanguageModel(nn.Module):
    """The layers, from embeddings to the input of the output head."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.cache = d.cache
        self.layers = nn.ModuleList(TextLayer(d) for _ in range(d.layers))
        self.norm = RmsNorm(d.features)
        self.rotary = Rotary(d.head_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """X [1, L, features] at ``positions`` int64 [L] -> [1, L, features]."""
        cos, sin = self.rotary(positions, x.dtype)
        mask = (torch.arange(self.cache, device=x.device) <= positions[:, None])[None, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, positions)
        y: Tensor = self.norm(x)
        return y


class TextDecoder(nn.Module):
    """The method ``text_decoder``: embeddings at positions -> logits [1, L, vocabulary]; the cache is its state."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.language_model = LanguageModel(d)
        self.lm_head = nn.Linear(d.features, d.vocabulary, bias=False)

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        """Embeddings [1, L, features] and int64 [L]; attention reads only written positions."""
        y: Tensor = self.lm_head(self.language_model(inputs_embeds, cache_position))
        return y


class TokenEmbedding(nn.Module):
    """The method ``token_embedding``: tokens int64 [1, L] -> [1, L, features]."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(d.vocabulary, d.features)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.embed_tokens(tokens)
        return y


class Voxtral(nn.Module):
    """The methods by their names. No two share the name of a weight: in a .ptd a name identifies one weight."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.audio_encoder = AudioEncoder(d)
        self.token_embedding = TokenEmbedding(d)
        self.text_decoder = TextDecoder(d)
