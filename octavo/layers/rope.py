"""Tables of cos and sin for every position, in the RoPE variants that models use.

Built once at load by `models.decoder`. The formulas are those of transformers'
`modeling_rope_utils`, so that a checkpoint means the same here and there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.kernels.inputs import RopeTable
from octavo.layers.rope_spec import QueryTemperature, RopeSpec

MEAN_POSITIONS = 4096


def build_rope_table(spec: RopeSpec, max_model_len: int, device: torch.device) -> RopeTable:
    """Returns the table for positions 0..max_model_len - 1, the same bits on every device.

    `dynamic` RoPE grows its base with the length of the text. Growing it as the sequence grows
    would give one position different rotations over time, and cached keys would go stale; so here
    the base is that of `max_model_len` where this exceeds the trained length, and the trained one
    otherwise. A position has the same rotation in every request and step.
    """
    angles = torch.outer(
        torch.arange(max_model_len, dtype=torch.float32), inverse_frequencies(spec, max_model_len)
    )
    return RopeTable(
        cos=angles.cos().mul_(spec.attention_factor).to(device),
        sin=angles.sin().mul_(spec.attention_factor).to(device),
        rotary_dim=spec.rotary_dim,
    )


def inverse_frequencies(spec: RopeSpec, max_model_len: int) -> Tensor:
    """Returns radians per position, float32 [rotary_dim // 2]."""
    dim = spec.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    theta = spec.theta
    if spec.type == "dynamic":
        stretch = max(max_model_len, spec.original_max_position_embeddings)
        stretch /= spec.original_max_position_embeddings
        theta *= (spec.factor * stretch - (spec.factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / theta**exponents
    if spec.type == "proportional":
        frequencies[int(spec.proportion * dim // 2) :] = 0.0
        return frequencies / spec.factor
    if spec.type == "linear":
        return frequencies / spec.factor
    if spec.type == "llama3":
        return _llama3(spec, frequencies)
    if spec.type == "yarn":
        return _yarn(spec, frequencies)
    return frequencies


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Slow dimensions are divided by the factor, fast ones kept, those between interpolated."""
    turns = spec.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = spec.low_freq_factor, spec.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / spec.factor)


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """As llama3, with a ramp that is linear in the dimension instead of in the turns."""
    dim, length = spec.rotary_dim, spec.original_max_position_embeddings

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    first, last = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    ramp = torch.arange(dim // 2, dtype=torch.float32).sub_(first).div_(last - first).clamp_(0, 1)
    return frequencies * (1 - ramp) + frequencies / spec.factor * ramp


def mean_rotated(x_KD: Tensor, rope: RopeTable) -> Tensor:
    """Returns the mean of a vector that is rotated as if it stood at each of the first
    MEAN_POSITIONS positions: slow dimensions keep it, fast ones lose it."""
    return _turned(x_KD, rope.cos[:MEAN_POSITIONS].mean(0), rope.sin[:MEAN_POSITIONS].mean(0))


def rotated(x_TKD: Tensor, rope: RopeTable) -> Tensor:
    """Returns x [T, K, D] rotated as at positions 0..T - 1."""
    return _turned(x_TKD, rope.cos[: len(x_TKD), None], rope.sin[: len(x_TKD), None])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    low, high, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def build_temperatures(
    temperature: QueryTemperature, max_model_len: int, device: torch.device
) -> Tensor:
    """Returns the factor of the queries at positions 0..max_model_len - 1, float32."""
    positions = torch.arange(max_model_len, dtype=torch.float32)
    steps = torch.floor((positions + 1.0) / temperature.floor)
    return torch.log1p(steps).mul_(temperature.scale).add_(1.0).to(device)
