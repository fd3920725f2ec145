"""A small Llama in torch with the weight names and semantics of LlamaForCausalLM."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MiniConfig:
    """The shape of the model; the names are those of a Hugging Face config.json."""

    vocab_size: int = 1088
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    def to_dict(self) -> dict[str, float | int]:
        """Returns the fields by name."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


def rope_tables(config: MiniConfig, length: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine tables [length, head_dim]."""
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64), config.rope_theta**-index)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE in the `rotate_half` convention."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


BLOCK_TOKENS = 64
LEVELS = (0.12837, 0.38799, 0.65668, 0.94224, 1.25613, 1.61794, 2.06892, 2.73250)


class FakeQuant(nn.Module):
    """Rotates, codes in four bits and decodes a K/V vector."""

    def __init__(self, dim: int, seed: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sign = torch.randint(0, 2, (dim,), generator=generator).float() * 2 - 1
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < dim:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        self.register_buffer("rotation", matrix / math.sqrt(dim) * sign, persistent=False)
        levels = torch.tensor([-v for v in reversed(LEVELS)] + list(LEVELS))
        self.register_buffer("levels", levels / math.sqrt(dim), persistent=False)
        self.register_buffer("edges", (self.levels[1:] + self.levels[:-1]) / 2, persistent=False)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Returns what a reader of the coded vector sees."""
        norm = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
        unit = (x.float() / norm) @ self.rotation.T
        coded = self.levels[torch.bucketize(unit, self.edges)]
        return (coded @ self.rotation * norm).to(x.dtype)


def coded_attention(q: Tensor, k: Tensor, v: Tensor, quant: FakeQuant) -> Tensor:
    """Causal attention that reads exact K/V in the query's own block, decoded codes elsewhere."""
    length = q.shape[-2]
    index = torch.arange(length)
    block = index // BLOCK_TOKENS
    own = block[:, None] == block[None, :]
    scale = 1 / math.sqrt(q.shape[-1])
    scores = torch.where(own, q @ k.transpose(-1, -2), q @ quant.decode(k).transpose(-1, -2))
    scores = (scores * scale).masked_fill(index[:, None] < index[None, :], -math.inf)
    share = scores.softmax(-1)
    return (share * own) @ v + (share * ~own) @ quant.decode(v)


class Attention(nn.Module):
    """Grouped-query causal attention."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        size, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, size, bias=False)
        self.quant = FakeQuant(dim)
        self.coded = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, noise: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        dim = self.config.head_dim
        q = self.q_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if noise is not None:
            k, v = noisy(k, noise[0]), noisy(v, noise[1])
        if self.coded:
            groups = self.config.num_attention_heads // self.config.num_key_value_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            y = coded_attention(q, k, v, self.quant)
        else:
            y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def noisy(x: Tensor, field: Tensor) -> Tensor:
    """Adds the error of a 4-bit code: isotropic, a fixed share of each vector's norm."""
    return x + field * x.detach().norm(dim=-1, keepdim=True)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Grouped causal attention in chunks of queries; on a CPU faster to train than the built-in."""
    batch, heads, length, dim = q.shape
    kv = k.shape[1]
    groups, outputs = heads // kv, []
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        rows = end - begin
        part = q[:, :, begin:end].reshape(batch * kv, groups * rows, dim)
        keys, values = k[:, :, :end].reshape(-1, end, dim), v[:, :, :end].reshape(-1, end, dim)
        mask = torch.full((rows, end), -1e9, dtype=q.dtype).triu(begin + 1)
        mask = mask.repeat(groups, 1)[None]
        scores = torch.baddbmm(mask, part, keys.transpose(1, 2), alpha=1 / math.sqrt(dim))
        outputs.append(torch.bmm(scores.softmax(-1), values).view(batch, kv, groups, rows, dim))
    return torch.cat(outputs, 3).reshape(batch, heads, length, dim)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, noise: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, noise)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The layers between the embedding and the output head."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Mini(nn.Module):
    """The model; the embedding is also the output head."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        cos, sin = rope_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, tokens: Tensor, noise: list[Tensor] | None = None) -> Tensor:
        """Returns the normalised last hidden states [batch, length, hidden_size].

        `noise` holds for each layer the errors of K and V, [2, batch, kv heads, length, head_dim].
        """
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, None if noise is None else noise[index])
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the next-token scores for some hidden states."""
        return hidden @ self.model.embed_tokens.weight.to(hidden.dtype).T
