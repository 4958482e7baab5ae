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

YaRN (arXiv 2309.00071) blends by the pair's number instead. Pair `n(t)` turns `t` times within the original context:

    n(t) = width ln(context / (2 pi t)) / (2 ln theta),  low = floor(n(beta_fast)),  high = ceil(n(beta_slow))

Pairs up to `low` stay, those from `high` on are divided by the factor, in between it is blended in proportion. YaRN
also sharpens attention: cosines and sines, and so rotated queries and keys, are multiplied by `1 + 0.1 ln(factor)`.
Layers without positions stay as they are, and a norm after the rotation takes the factor away again. Latent attention
has features without positions, and sharpens the products of whole queries and keys instead (`mla.py`).

Tables are computed in float64 on the CPU and rounded to float32, so they are the same on every device.

On a GPU queries and keys are turned together by one kernel (`kernels/rope`), in an operator that the compiler does not
look into and that keeps nothing but the tables for the backward pass, which turns the gradients back.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_fp8.kernels.rope import DTYPES, reference, rotate
from titan_fp8.models.dims import RopeScaling, YarnScaling
from titan_fp8.runtime.operators import register_operator


class RopeTables:
    """Cosines and sines of the angles, times YaRN's factor where there is one; float32 `[S, head_dim / 2]` each.

    A plain object rather than a tuple or a dataclass: FSDP2 casts a module's floating-point inputs to the compute dtype
    and looks into both, and tables in bfloat16 confuse neighbouring positions.
    """

    def __init__(self, cos: Tensor, sin: Tensor, positions: Tensor | None = None, longest: int | None = None):
        self.cos = cos
        self.sin = sin
        self._positions = positions
        self.longest = self.seq_len if longest is None else longest
        """The largest position + 1, or more."""

    @property
    def seq_len(self) -> int:
        """S."""
        return self.cos.shape[0]

    @property
    def positions(self) -> Tensor:
        """The tokens' positions in their sequence, `[S]`."""
        return torch.arange(self.seq_len, device=self.cos.device) if self._positions is None else self._positions


Scaling = RopeScaling | YarnScaling | None


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling = None) -> Tensor:
    """Angle per position of each pair of features, float64 `[head_dim / 2]` on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnScaling):
        stretched = _yarn_ramp(head_dim, theta, scaling)
        return frequencies * (1.0 - stretched + stretched / scaling.factor)
    turns = scaling.original_max_position * frequencies / (2 * torch.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0) if high > low else (turns >= low).double()
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def _yarn_ramp(width: int, theta: float, scaling: YarnScaling) -> Tensor:
    """How far each pair is stretched, from 0 to 1, float64 `[width / 2]`."""

    def pair_of(turns: float) -> float:
        return width * math.log(scaling.original_max_position / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64, device="cpu")
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)


def apply_rope(x: Tensor, tables: RopeTables) -> Tensor:
    """Turn every pair of features by its position's angle.

    Args:
        x: `[B, S, H, head_dim]`, any floating dtype; the rotation is computed in float32.
        tables: for positions `0 .. S-1`.

    Returns:
        `[B, S, H, head_dim]` in the dtype of `x`.
    """
    assert tables.cos.dtype == torch.float32, f"rope tables were cast to {tables.cos.dtype}"
    return reference.rotate(x, tables.cos, tables.sin)


def rotate_queries_and_keys(q: Tensor, k: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
    """`apply_rope` of q `[B, S, H, head_dim]` and k `[B, S, G, head_dim]`, of one dtype: by one kernel on a GPU."""
    if not _is_for_kernel(q):
        return apply_rope(q, tables), apply_rope(k, tables)
    assert tables.cos.dtype == torch.float32, f"rope tables were cast to {tables.cos.dtype}"
    return _Rotation.apply(q, k, tables.cos, tables.sin)


def _is_for_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in DTYPES


rotate_op = register_operator(
    "rotate(Tensor[] xs, Tensor cos, Tensor sin, bool inverse) -> Tensor[]",
    lambda xs, cos, sin, inverse: rotate(xs, cos, sin, inverse=inverse),
    lambda xs, cos, sin, inverse: [x.new_empty(x.shape) for x in xs],
)
"""`rotate([x [B, S, H, D], ...], cos [S, D / 2], sin, inverse)`: see `kernels.rope.rotate`."""


class _Rotation(torch.autograd.Function):
    """q `[B, S, H, D]`, k `[B, S, G, D]`, cos and sin `[S, D / 2]` -> q and k, turned."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k = rotate_op([q, k], cos, sin, False)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k = rotate_op([grad_q, grad_k], cos, sin, True)
        return grad_q, grad_k, None, None


class RotaryEmbedding(nn.Module):
    """Owns the tables for positions `0 .. max_positions - 1`.

    The buffers are not part of the state dict, and they are recomputed, not copied, whenever the module is moved, cast
    or materialized: they are right after `to_empty` and stay float32 under `.to(torch.bfloat16)`.

    Args:
        head_dim: width of a head, even.
        max_positions: number of positions in the tables.
        theta: base of the wavelengths.
        scaling: frequency scaling, YaRN's with a factor on the tables, or None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: Scaling = None):
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
        factor = self.scaling.sharpening if isinstance(self.scaling, YarnScaling) else 1.0
        self.cos = (factor * angles.cos()).float().to(device)
        self.sin = (factor * angles.sin()).float().to(device)

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
            return RopeTables(self.cos[positions], self.sin[positions], positions, seq_len)
        return RopeTables(self.cos[:seq_len], self.sin[:seq_len])
