"""Rotary embedding tables, in the rotate-half convention of Hugging Face checkpoints."""

import math

import numpy as np
import numpy.typing as npt

from kvmesh.backends.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float64]:
    """float64 [head_dim / 2]: radians per position of each pair of channels, after scaling."""
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return np.asarray(frequencies / rope.factor)
    if rope.kind == "llama3":
        return _stretch_llama3(rope, frequencies)
    return np.asarray(frequencies)


def _stretch_llama3(
    rope: RopeConfig, frequencies: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Long waves are slowed by `factor`, short ones kept, those between are blended."""
    waves_in_context = rope.original_context * frequencies / (2 * math.pi)
    blend = (waves_in_context - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)
    return np.asarray((1 - blend) * frequencies / rope.factor + blend * frequencies)


def rope_tables(
    rope: RopeConfig, head_dim: int, max_context: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(cos, sin), each float32 [max_context, head_dim / 2], row = position."""
    # The reference rounds the frequencies to float32; a model was trained on the rounded ones.
    frequencies = inverse_frequencies(rope, head_dim).astype(np.float32).astype(np.float64)
    angles = np.arange(max_context, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
