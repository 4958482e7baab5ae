"""Attention of a block of queries with a block of keys, by the fused kernels of PyTorch or in plain operators.

A kernel's forward gives the output and the logarithm of its softmax's denominator (log-sum-exp), with which blocks can
be merged; its backward takes those of the whole softmax, and so gives a block's part of the whole gradients. Causal
blocks are aligned at the last query and the last key.

Products of queries and keys are multiplied by a scale, None for `1 / sqrt(D)`. Values may be narrower or wider than
keys, as those of latent attention are; kernels of one width are given zeros, here and not before heads travel.

Legend: B sequences, T tokens of a block, H query heads, G key and value heads (H is a multiple of G), D head width of
queries and keys, D' that of values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fp8.models import flash4
from titan_fp8.models.attention_backends import kernel_widths, widen

_aten = torch.ops.aten
Scale = float | None


@dataclass(frozen=True)
class BlockKernels:
    """The kernels of an attention backend.

    Attributes:
        forward: `(q [B, H, T, D], k [B, G, T', D], v [B, G, T', D'], causal, scale)` -> output `[B, H, T, D']`,
            log-sum-exp fp32 `[B, H, T]`.
        backward: `(grad_output, q, k, v, output, log-sum-exp, causal, scale)` -> the gradients of q, k and v, then
            anything.
        rectangular: whether a causal block may have more keys than queries.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, Scale], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Scale], tuple[Tensor, ...]]
    rectangular: bool


def block_kernels(backend: str, device: torch.device) -> BlockKernels:
    """The kernels of a resolved attention backend, not "flex"."""
    if backend == "flash":
        on_gpu = device.type == "cuda"
        return _FLASH if on_gpu else _CPU_FLASH
    if backend == "cudnn":
        return _CUDNN
    if backend == "flash4":
        return _FLASH4
    if backend == "efficient":
        return _EFFICIENT
    assert backend == "math", f"{backend} attention has no kernel for blocks"
    return _MATH


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)


def _cpu_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale
):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    return _aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale
):
    lengths = (None, None, q.shape[2], k.shape[2])
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, seed, scale=scale
    )


def _flash4(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    assert scale is None, "FlashAttention 4 is given no scale"
    out, lse = flash4.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
    return out.transpose(1, 2), lse


def _flash4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale
):
    by_token = [each.transpose(1, 2) for each in (grad, q, k, v, out)]
    return tuple(each.transpose(1, 2) for each in flash4.backward(*by_token, lse, causal))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=causal, scale=scale)
    return out, lse.reshape(out.shape[:3])


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale
):
    lengths = (None, None, q.shape[2], k.shape[2])
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, *lengths, 0.0, causal, scale=scale
    )


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    k, v = _repeat(k, q), _repeat(v, q)
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, is_causal=causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # the kernel rounds the length up


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale
):
    lse = F.pad(lse, (0, -lse.shape[-1] % 32))
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    wanted = [True, True, True, False]
    grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, _repeat(k, q), _repeat(v, q), None, out, lse, seed, seed, 0.0, wanted, causal, scale=scale
    )
    return grad_q, _sum_repeats(grad_k, k), _sum_repeats(grad_v, v)


def _math(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ _repeat(v, q).float()).to(q.dtype), lse


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale):
    probabilities = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    grad_probabilities = grad @ _repeat(v, q).float().mT
    grad_scores = probabilities * (grad_probabilities - (grad * out.float()).sum(-1, keepdim=True))
    grad_scores *= _factor(q, scale)
    grad_q = grad_scores @ _repeat(k, q).float()
    return grad_q, _sum_repeats(grad_scores.mT @ q.float(), k), _sum_repeats(probabilities.mT @ grad, v)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: Scale) -> Tensor:
    scores = q.float() @ _repeat(k, q).float().mT * _factor(q, scale)
    if not causal:
        return scores
    queries, keys = scores.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return scores.masked_fill(~visible, float("-inf"))


def _factor(q: Tensor, scale: Scale) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, T, D] to the heads of q."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_repeats(grad: Tensor, x: Tensor) -> Tensor:
    """[B, H, T, D] to the heads of x."""
    return grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _with_zeros(backend: str, kernels: BlockKernels) -> BlockKernels:
    """Kernels of the head widths that a backend can do (`kernel_widths`), for others too."""

    def fit(q: Tensor, k: Tensor, v: Tensor, scale: Scale) -> tuple[Tensor, Tensor, Tensor, float]:
        width, value_width = kernel_widths(backend, q.shape[-1], v.shape[-1])
        return widen(q, width), widen(k, width), widen(v, value_width), _factor(q, scale)

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Scale):
        wide_q, wide_k, wide_v, factor = fit(q, k, v, scale)
        out, lse = kernels.forward(wide_q, wide_k, wide_v, causal, factor)
        return out[..., : v.shape[-1]], lse

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: Scale):
        wide_q, wide_k, wide_v, factor = fit(q, k, v, scale)
        grad, out = (widen(x, wide_v.shape[-1]) for x in (grad, out))
        gradients = kernels.backward(grad, wide_q, wide_k, wide_v, out, lse, causal, factor)[:3]
        return tuple(each[..., : x.shape[-1]] for each, x in zip(gradients, (q, k, v), strict=True))

    return BlockKernels(forward, backward, kernels.rectangular)


_CPU_FLASH = _with_zeros("flash", BlockKernels(_cpu_flash, _cpu_flash_backward, rectangular=False))
_FLASH = _with_zeros("flash", BlockKernels(_flash, _flash_backward, rectangular=True))
_CUDNN = _with_zeros("cudnn", BlockKernels(_cudnn, _cudnn_backward, rectangular=False))
_FLASH4 = BlockKernels(_flash4, _flash4_backward, rectangular=False)
_EFFICIENT = _with_zeros("efficient", BlockKernels(_efficient, _efficient_backward, rectangular=False))
_MATH = BlockKernels(_math, _math_backward, rectangular=True)
