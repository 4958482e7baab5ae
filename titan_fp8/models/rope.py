"""Rotary position embedding (arXiv 2104.09864), in real arithmetic.

Features `2i` and `2i+1` of a head are the real and imaginary part of one complex number; at position `p` it is turned
by the angle `p * frequency_i`. The product of a turned query and a turned key then depends on the distance of their
positions alone. Neighbouring features form a pair, as in Meta's checkpoints; Hugging Face's files pair feature `i`
with `i + head_dim / 2`, so weights that come from there have the rows of `wq` and `wk` permuted.

Llama 3.1 stretches the slow rotations to a longer context (`RopeScaling`). With `wavelength = 2 pi / frequency`, in
tokens, and `context` the original context length:

    wavelength < context / high_freq_factor     the frequency stays
    wavelength > context / low_freq_factor      frequency / factor
    in between                                  (1 - s) * frequency / factor + s * frequency
                                                s = (context / wavelength - low) / (high - low)

Tables are computed in float64 on the CPU and rounded to float32, so they are the same on every device.
"""

import torch
from torch import Tensor, nn

from titan_fp8.models.flavors import RopeScaling


class RopeTables:
    """Cosines and sines of the angles, float32 `[S, head_dim / 2]` each.

    A plain object rather than a tuple or a dataclass: FSDP2 casts a module's floating-point inputs to the compute dtype
    and looks into both, and tables in bfloat16 confuse neighbouring positions.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos = cos
        self.sin = sin

    @property
    def seq_len(self) -> int:
        """S."""
        return self.cos.shape[0]


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angle per position of each pair of features, float64 `[head_dim / 2]` on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * torch.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(x: Tensor, tables: RopeTables) -> Tensor:
    """Turn every pair of features by its position's angle.

    Args:
        x: `[B, S, H, head_dim]`, any floating dtype; the rotation is computed in float32.
        tables: for positions `0 .. S-1`.

    Returns:
        `[B, S, H, head_dim]` in the dtype of `x`.
    """
    assert tables.cos.dtype == torch.float32, f"rope tables were cast to {tables.cos.dtype}"
    cos, sin = tables.cos[:, None, :], tables.sin[:, None, :]  # [S, 1, head_dim / 2]
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Owns the tables for positions `0 .. max_positions - 1`.

    The buffers are not part of the state dict, and they are recomputed, not copied, whenever the module is moved, cast
    or materialized: they are right after `to_empty` and stay float32 under `.to(torch.bfloat16)`.

    Args:
        head_dim: width of a head, even.
        max_positions: number of positions in the tables.
        theta: base of the wavelengths.
        scaling: frequency scaling, or None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.head_dim, self.max_positions, self.theta, self.scaling = head_dim, max_positions, theta, scaling
        empty = torch.empty(max_positions, head_dim // 2)
        self.register_buffer("cos", empty, persistent=False)
        self.register_buffer("sin", empty, persistent=False)
        self._compute(empty.device)

    def _compute(self, device: torch.device) -> None:
        if device.type == "meta":
            self.cos = torch.empty(self.max_positions, self.head_dim // 2, dtype=torch.float32, device=device)
            self.sin = torch.empty_like(self.cos)
            return
        positions = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, rope_frequencies(self.head_dim, self.theta, self.scaling))
        self.cos = angles.cos().float().to(device)
        self.sin = angles.sin().float().to(device)

    def _apply(self, fn, recurse: bool = True):  # the hook behind to(), to_empty(), cuda(), half()...
        super()._apply(fn, recurse)
        self._compute(self.cos.device)
        return self

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, max_positions={self.max_positions}, theta={self.theta}, {self.scaling}"

    def forward(self, seq_len: int, device: torch.device, positions: Tensor | None = None) -> RopeTables:
        """The tables of the first `seq_len` positions, or of those in `positions [S]`, each below `seq_len`, on
        `device` (parameters may live elsewhere, e.g. offloaded)."""
        if seq_len > self.max_positions:
            raise ValueError(
                f"a sequence of {seq_len} tokens is longer than the model's {self.max_positions} positions"
            )
        if self.cos.device != device:
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        if positions is not None:
            return RopeTables(self.cos[positions], self.sin[positions])
        return RopeTables(self.cos[:seq_len], self.sin[:seq_len])
