"""Structured initial weights: random matrices arranged so that copying is easy to learn.

Nothing here knows a word or an answer. Layer 0 begins with heads that look a fixed number of
tokens back (a constant embedding entry meets RoPE), and the later layers begin with heads whose
query and key compare the tokens seen there and copy the token found. Training does the rest,
but need not spend its first hours on finding this circuit by chance.
"""

from __future__ import annotations

import math

import torch
from model import Mini, MiniConfig
from torch import Tensor

EMBED_STD = 0.2
CONSTANT = 0.8
OFFSETS = ((1, 20.0), (2, 20.0), (3, 20.0), (4, 20.0), (1, 20.0), (2.5, 6.0), (4.5, 4.0), (7, 2.0))
SHARP_PAIRS = 14
FIRST_CONTENT_PAIR = 17
NOISE = 0.02


def orthogonal(rows: int, columns: int) -> Tensor:
    """Returns a random matrix whose shorter side is orthonormal."""
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def offset_heads(model: Mini, codes: list[Tensor]) -> list[Tensor]:
    """Sets layer 0 to look back by `OFFSETS`; returns each head's output map [hidden, dim]."""
    config: MiniConfig = model.config
    attention = model.model.layers[0].self_attn
    dim, half = config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_theta ** -(torch.arange(half) / half)
    mask = (torch.arange(half) < SHARP_PAIRS).float()
    # What the constant entry is after normalisation of an embedding row.
    unit = CONSTANT / math.sqrt(EMBED_STD**2 + CONSTANT**2 / config.hidden_size)
    maps = []
    for head, (offset, sharpness) in enumerate(OFFSETS):
        amplitude = math.sqrt(sharpness) / unit
        query = torch.cat(
            (mask * torch.cos(offset * frequency), -mask * torch.sin(offset * frequency))
        )
        attention.q_proj.weight.data[head * dim : (head + 1) * dim, 0] += amplitude * query
        kv = head // groups
        if head % groups == 0:
            key = torch.cat((mask, torch.zeros(half)))
            attention.k_proj.weight.data[kv * dim : (kv + 1) * dim, 0] += key / unit
            attention.v_proj.weight.data[kv * dim : (kv + 1) * dim] += codes[head // 4]
        out = orthogonal(config.hidden_size, dim)
        attention.o_proj.weight.data[:, head * dim : (head + 1) * dim] += EMBED_STD * out
        maps.append(out)
    return maps


def match_heads(model: Mini, layer: int, codes: list[Tensor], maps: list[Tensor]) -> None:
    """Sets a layer to find where the last tokens occurred before and to copy what followed."""
    config = model.config
    attention = model.model.layers[layer].self_attn
    dim, half = config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    rows = torch.cat(
        (torch.arange(FIRST_CONTENT_PAIR, half), torch.arange(FIRST_CONTENT_PAIR, half) + half)
    )
    copies = orthogonal(config.hidden_size, config.hidden_size)
    for kv in range(config.num_key_value_heads):
        bank = kv % 2
        code, back = codes[bank], maps[4 * bank : 4 * bank + 4]
        query, key = torch.zeros(dim, config.hidden_size), torch.zeros(dim, config.hidden_size)
        for step in range(4):
            mix = torch.randn(len(rows), dim) / math.sqrt(dim)
            seen = code if step == 0 else back[step - 1].T
            query[rows] += mix @ seen
            key[rows] += mix @ back[step].T
        copy = copies[kv * dim : (kv + 1) * dim]
        attention.k_proj.weight.data[kv * dim : (kv + 1) * dim] += key
        attention.v_proj.weight.data[kv * dim : (kv + 1) * dim] += copy
        for head in range(kv * groups, (kv + 1) * groups):
            attention.q_proj.weight.data[head * dim : (head + 1) * dim] += 1.5 * query
            attention.o_proj.weight.data[:, head * dim : (head + 1) * dim] += 0.2 * copy.T


def initialise(model: Mini, seed: int) -> None:
    """Fills all weights from a seed."""
    torch.manual_seed(seed)
    config = model.config
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = NOISE if "self_attn" in name else 0.6 / math.sqrt(weight.shape[1])
            torch.nn.init.normal_(weight, std=scale * (0.3 if "down_proj" in name else 1.0))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBED_STD)
    model.model.embed_tokens.weight.data[:, 0] = CONSTANT
    model.model.norm.weight.data.fill_(0.25)
    codes = [orthogonal(config.head_dim, config.hidden_size) for _ in range(2)]
    for code in codes:
        code[:, 0] = 0.0
    maps = offset_heads(model, codes)
    for layer in range(1, config.num_hidden_layers):
        match_heads(model, layer, codes, maps)
