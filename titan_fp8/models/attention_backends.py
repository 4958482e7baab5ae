"""Which kernel computes `softmax(q k^T / sqrt(d) + mask) v`, and the masks it needs.

| backend   | runs on                              | documents masked | what it is                                   |
|-----------|--------------------------------------|------------------|----------------------------------------------|
| math      | anything                             | dense mask       | the reference: all S x S scores in memory    |
| flash     | CPU; CUDA from SM80 in bf16 or fp16  | CPU: dense mask  | PyTorch's fused kernel                       |
| efficient | CUDA                                 | dense mask       | memory-efficient kernel, float32 too         |
| cudnn     | CUDA from SM80 in bf16 or fp16       | no               | cuDNN's fused kernel; not deterministic      |
| flash4    | SM90 in bf16 or fp16, with its       | no               | FlashAttention 4 (`flash4.py`); not          |
|           | package installed                    |                  | deterministic                                |
| flex      | CUDA                                 | block mask       | flex_attention, compiled by Triton           |

`auto` is a static rule, so that all processes of a job and all of its restarts agree; it never tries kernels out:

- CPU: flash.
- CUDA with documents masked: flex.
- CUDA in float32: efficient.
- CUDA in bf16 or fp16: flash4 where it runs; cudnn on Hopper and data-centre Blackwell (measured on an H200, sequence
  8192, head width 128: 641 TFLOP/s forward, 495 backward, against 337 and 284 for flash); neither if deterministic
  algorithms are asked for; otherwise flash, and efficient before SM80.

flash4 is there where its package is installed, so all machines of a job should have the same packages.

Latent attention has values narrower or wider than queries and keys. Kernels of one width, and those that cannot do some
widths, are given heads with zeros beside them (`kernel_widths`), which change no product.

Legend: B sequences, S tokens, H query heads, G key and value heads (H is a multiple of G), D head width of queries and
keys, D' that of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from titan_fp8.models import flash4
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.kept_results import told
from titan_fp8.runtime.suggest import did_you_mean

Backend = Literal["math", "flash", "efficient", "cudnn", "flash4", "flex"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Mask = Tensor | BlockMask | None
"""None (causal), a bool `[B, 1, S, S]` that is True where a query may look, or a flex block mask."""

_SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_aten = torch.ops.aten
SDPA_OPERATORS = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""What `scaled_dot_product_attention` computes with in one operator, which whoever recomputes a block may keep."""
_attend = told(F.scaled_dot_product_attention, SDPA_OPERATORS)
_HALF = (torch.bfloat16, torch.float16)
_OF_ANY_WIDTHS = ("math", "flash4")
"""They get heads as they are: `math` takes any, and `flash4` no latent attention."""
_OF_ONE_WIDTH = ("flash", "cudnn")
"""Kernels whose values must be as wide as queries and keys."""
_NARROWEST_IN_FLEX = 16
_WIDE_IN_FLEX = 128
_OF_WIDE_FP32: dict[str, Any] = {
    "num_stages": 1, "fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32,
}  # fmt: skip
"""Wider heads in fp32 take more shared memory than there is, in the blocks that PyTorch chooses."""
_GRANULE_OF_EFFICIENT = 8
"""Its rows are read in 16 bytes."""
_MAX_HEAD_DIM = {"flash": 256, "cudnn": 128, "flash4": flash4.MAX_HEAD_DIM}


@dataclass(frozen=True)
class AttentionTask:
    """What a kernel must be able to do: where, in which dtype, at which head width, with which guarantees."""

    device: DeviceCapabilities
    dtype: torch.dtype
    head_dim: int
    """The wider of the heads of queries and of values."""
    scaled: bool = False
    """Values have a width and products a factor of their own, as in latent attention."""
    document_masking: bool = False
    deterministic: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU runs it (ROCm included)."""
        return self.device.kind == "cuda"

    @property
    def is_before_sm80(self) -> bool:
        """Whether it is an NVIDIA GPU without the tensor-core features of the fused half-precision kernels."""
        capability = self.device.compute_capability
        return self.is_cuda and capability is not None and capability < (8, 0)


def resolve_backend(requested: str, task: AttentionTask) -> Backend:
    """The backend to use for `requested` (`model.attention_backend`).

    Raises:
        UserError: the name is unknown, or the backend cannot do `task`; the message says why and what can.
    """
    if requested == "auto":
        return _choose(task)
    if requested not in BACKENDS:
        raise UserError(
            f'model.attention_backend = "{requested}": not one of auto, {", ".join(BACKENDS)}'
            f"{did_you_mean(requested, ('auto', *BACKENDS))}"
        )
    reason = _obstacle(requested, task)
    if reason is not None:
        able = [name for name in BACKENDS if _obstacle(name, task) is None]
        raise UserError(
            f'model.attention_backend = "{requested}" cannot run here: {reason}; '
            f'use "auto" (which means "{_choose(task)}" here) or one of {", ".join(able)}'
        )
    return requested


def _choose(task: AttentionTask) -> Backend:
    """The rule behind `auto`."""
    if not task.is_cuda:
        return "flash"
    if task.document_masking:
        return "flex"
    if _obstacle("flash4", task) is None:
        return "flash4"
    capability = task.device.compute_capability
    is_fast_in_cudnn = capability is not None and capability[0] in (9, 10)
    if is_fast_in_cudnn and _obstacle("cudnn", task) is None:
        return "cudnn"
    return "flash" if _obstacle("flash", task) is None else "efficient"


def _obstacle(backend: Backend, task: AttentionTask) -> str | None:
    """Why `backend` cannot do `task`, or None."""
    if backend == "math":
        return None
    if not task.is_cuda:
        return None if backend == "flash" else f"it needs a CUDA device, and this is a {task.device.kind.upper()}"
    if backend in ("flash", "cudnn", "flash4"):
        return _half_precision_obstacle(backend, task)
    return None


def _half_precision_obstacle(backend: Backend, task: AttentionTask) -> str | None:
    """Why the fused half-precision kernels of a GPU cannot do `task`, or None."""
    if task.dtype not in _HALF:
        return f"it computes in bfloat16 or float16, not {str(task.dtype).removeprefix('torch.')}"
    if task.is_before_sm80:
        return f"it needs compute capability 8.0, and {task.device.name} has {task.device.compute_capability}"
    if task.document_masking:
        return "it takes no mask, and training.document_masking is set"
    limit = _MAX_HEAD_DIM[backend]
    if task.head_dim > limit or task.head_dim % 8:
        return f"it takes head widths that are multiples of 8 up to {limit}, and the model's is {task.head_dim}"
    if backend == "cudnn" and task.device.compute_capability is None:
        return f"it needs an NVIDIA GPU, and this is {task.device.name}"
    if backend == "flash4" and task.scaled:
        return "it has one width and one factor, and the model's latent attention has others"
    if backend == "flash4":
        capability = task.device.compute_capability
        if capability is None or capability[0] != 9:
            return f"it is used on compute capability 9.0 alone, and {task.device.name} has {capability}"
        reason = flash4.obstacle()
        if reason is not None:
            return reason
    if backend in ("cudnn", "flash4") and task.deterministic:
        return "it is not deterministic, and debug.deterministic is set"
    return None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: Backend, mask: Mask = None, *, scale: float | None = None
) -> Tensor:
    """Attention in which token s sees tokens 0..s, or what `mask` lets it see.

    Args:
        q: `[B, H, S, D]`.
        k, v: `[B, G, S, D]` and `[B, G, S, D']`; query head h uses head `h // (H / G)` of them.
        backend: a resolved backend.
        mask: what `attention_mask` returned for this backend.
        scale: factor on the products of queries and keys; None: `1 / sqrt(D)`.

    Returns:
        `[B, H, S, D']` in the dtype of `q`.
    """
    widths = q.shape[-1], v.shape[-1]
    given = kernel_widths(backend, *widths)
    if given != widths:
        q, k, v = widen(q, given[0]), widen(k, given[0]), widen(v, given[1])
        scale = widths[0] ** -0.5 if scale is None else scale
        return causal_attention(q, k, v, backend, mask, scale=scale)[..., : widths[1]]
    is_grouped = q.shape[1] != k.shape[1]
    if backend == "flex":
        assert isinstance(mask, BlockMask), "flex attention needs the block mask that attention_mask makes"
        options = _OF_WIDE_FP32 if q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > _WIDE_IN_FLEX else None
        return _compiled(flex_attention)(
            q, k, v, block_mask=mask, enable_gqa=is_grouped, scale=scale, kernel_options=options
        )
    if backend == "flash4":
        assert mask is None, "FlashAttention 4 is given no mask"
        assert scale is None, "FlashAttention 4 is given no scale"
        return flash4.attend(q, k, v)
    assert mask is None or isinstance(mask, Tensor), f"{backend} attention takes a dense mask"
    if is_grouped and backend == "efficient":  # the one kernel without grouped heads
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        is_grouped = False
    with sdpa_kernel(_SDPA_BACKENDS[backend]):
        return _attend(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped, scale=scale)


def kernel_widths(backend: str, width: int, value_width: int) -> tuple[int, int]:
    """The head widths, of queries and keys and of values, that a backend's kernel is given for heads of `width` and
    `value_width` features; a head that is narrower gets zeros."""
    if backend in _OF_ANY_WIDTHS:
        return width, value_width
    width = max(width, value_width)
    if backend in _OF_ONE_WIDTH:
        return width, width
    if backend == "flex":
        return max(width, _NARROWEST_IN_FLEX), max(value_width, _NARROWEST_IN_FLEX)
    return _round_up(width, _GRANULE_OF_EFFICIENT), _round_up(value_width, _GRANULE_OF_EFFICIENT)


def _round_up(width: int, granule: int) -> int:
    return -(-width // granule) * granule


def widen(x: Tensor, width: int) -> Tensor:
    """x `[..., D]` with zeros up to `[..., width]`."""
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def attention_mask(
    backend: Backend, seq_len: int, device: torch.device, document_ids: Tensor | None, chunk: int | None = None
) -> Mask:
    """The mask that `causal_attention` needs for a batch, made once and used by every layer.

    Args:
        backend: a resolved backend.
        seq_len: S.
        device: where the mask will be.
        document_ids: `[B, S]` integers, equal within a document, or None for one document a row. A token sees the
            tokens before it and itself, in its own document only.
        chunk: it sees those of its own chunk of so many positions only; None: of the whole sequence.
    """
    if chunk is not None:
        document_ids = documents_in_chunks(document_ids, seq_len, chunk, device)
    if backend == "flex":
        return _flex_mask(document_ids, seq_len, device)
    if document_ids is None:
        return None
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # [B, 1, S, S]
    return same & torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()


def documents_in_chunks(document_ids: Tensor | None, seq_len: int, chunk: int, device: torch.device) -> Tensor:
    """Numbers, `[B, S]` or `[1, S]`, that are equal where document and chunk are: tokens that see each other's chunk
    alone have documents that end where the chunks do."""
    chunks = torch.arange(seq_len, device=device).div(chunk, rounding_mode="floor").unsqueeze(0)
    n_chunks = -(-seq_len // chunk)
    return chunks if document_ids is None else document_ids * n_chunks + chunks


def _flex_mask(document_ids: Tensor | None, seq_len: int, device: torch.device) -> BlockMask:
    """Block mask of S x S; compiled, so that the dense mask is never in memory."""
    if document_ids is None:
        return _compiled(create_block_mask)(_causal, None, None, seq_len, seq_len, device=str(device))

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    rows = document_ids.shape[0]
    return _compiled(create_block_mask)(causal_in_document, rows, None, seq_len, seq_len, device=str(device))


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled, unless a surrounding region is being compiled and takes it in.

    Flex attention run eagerly is a slow dense reference, and a block mask made eagerly begins as a dense mask.
    """
    return function if torch.compiler.is_compiling() else _compile_once(function)


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
