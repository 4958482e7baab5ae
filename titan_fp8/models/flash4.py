"""FlashAttention 4 (the package flash-attn-4, kernels in CuTe's Python), where it is installed, as operators.

The package's own autograd function is not one that the compiler can look into, so its two kernels are operators here,
opaque as those of `quantization/ops.py`, and `attend` composes them. On Hopper they are faster than cuDNN's. Gradients
are summed by atomics, so they differ in their last bits from run to run.

The kernels are not a part of the package's public interface; one version is known (`VERSION`), and no other is used.

B sequences, S tokens, H query heads, G key and value heads (H is a multiple of G), D head width. Source: arXiv
2407.08608 (FlashAttention 3, the algorithm on Hopper).
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.runtime.operators import register_operator

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"
MAX_HEAD_DIM = 128


def obstacle() -> str | None:
    """Why the package cannot be used, or None."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed (pip install '{PACKAGE}[cu13]=={VERSION}')"
    return None if found == VERSION else f"it needs {PACKAGE} {VERSION}, and {found} is installed"


@functools.cache
def _interface() -> ModuleType:
    _keep_compiled_kernels()
    # Of the package's own call, when it compiles a kernel: nothing that anybody here could mend.
    warnings.filterwarnings("ignore", r"Argument aux_data \(position \d+\) cannot be converted", UserWarning)
    return importlib.import_module("flash_attn.cute.interface")


def _keep_compiled_kernels() -> None:
    """Let the package keep its compiled kernels in the user's cache, unless the environment says otherwise: by default
    every process compiles them again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if os.access(cache, os.W_OK):
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache / "flash_attention_cute_dsl"))


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, causal=causal, return_lse=True)
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Gradients come out with the strides of q, k and v.
    q, k, v, out, grad, lse = (each.contiguous() for each in (q, k, v, out, grad, lse))
    grad_q, grad_k, grad_v = _interface()._flash_attn_bwd(q, k, v, out, grad, lse, causal=causal)[:3]
    return grad_q, grad_k, grad_v


forward = register_operator(
    "flash4_forward(Tensor q, Tensor k, Tensor v, bool causal) -> (Tensor, Tensor)", _forward, _fake_forward
)
"""`flash4_forward(q [B, S, H, D], k, v [B, S', G, D], causal)` -> output `[B, S, H, D]` and log-sum-exp fp32
`[B, H, S]`."""

backward = register_operator(
    "flash4_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, out, lse, causal: tuple(each.new_empty(each.shape) for each in (q, k, v)),
)
"""`flash4_backward(grad [B, S, H, D], q, k, v, output, log-sum-exp, causal)` -> the gradients of q, k and v."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q `[B, H, S, D]` over k and v `[B, G, S, D]`: `[B, H, S, D]`, bf16 or fp16."""
    return _Attention.apply(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """q `[B, S, H, D]`, k and v `[B, S, G, D]` -> `[B, S, H, D]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = forward(q, k, v, True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return backward(grad, *ctx.saved_tensors, True)
