"""RMSNorm (arXiv 1910.07467): divide by the root mean square over the features, then scale each feature.

What is normed in a decoder is the residual stream, which goes on beside the norm. `keep_and_norm` and `add_and_norm`
return both, so that in eager mode on a GPU the kernel of the norm's backward (`kernels/producers`) adds the stream's
gradient too, before it rounds. The compiler fuses the plain expressions itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as module_of_torch

from titan_fp8.kernels import float8, producers
from titan_fp8.models.initialization import Constant, Distribution

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_of_torch, f"_global{name}") for name in _HOOKS]
"""Those of all modules, by torch.nn.modules.module.register_module_*_hook; one table each for good."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class RMSNorm(nn.RMSNorm):
    """`y = x / sqrt(mean(x^2) + eps) * weight.to(x.dtype)`, the mean taken in float32 over the last dim.

    Like `models.linear.Linear` it casts its parameter to the input's dtype and returns that dtype.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps=eps)

    def init_rules(self) -> dict[str, Distribution]:
        """The scale starts at one."""
        return {"weight": Constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`, same dtype."""
        if _takes_kernel(x):
            return _KeepAndNorm.apply(x, self.scale(x.dtype), self.eps)[1]
        return F.rms_norm(x, self.normalized_shape, self.scale(x.dtype), self.eps)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """What normed features are multiplied by, `[dim]`. Norms of a sequence that is spread have another one."""
        return self.weight.to(dtype)

    def keep_and_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(x, norm of x)`, both `[..., dim]`. Who goes on with that x lets backward add its gradient in the norm's."""
        if has_hooks(self) or not _takes_kernel(x):
            return x, self(x)
        return _KeepAndNorm.apply(x, self.scale(x.dtype), self.eps)

    def add_and_norm(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """`(x + branch, norm of it)`, all `[..., dim]` of one dtype."""
        return self.keep_and_norm(x + branch)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches what goes into a module or comes out of it. Compiled code has the hooks of the module
    alone, as PyTorch's compiler does."""
    if not torch.compiler.is_compiling() and any(_GLOBAL_HOOKS):
        return True
    return any(getattr(module, name) for name in _HOOKS)


def _takes_kernel(x: Tensor) -> bool:
    """Whether the backward of a norm of x is our kernel: for plain tensors in eager mode, outside of autocast."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(x) is not Tensor:
        return False
    return x.dtype in _KERNEL_DTYPES and float8.uses_kernel(x) and not torch.is_autocast_enabled(x.device.type)


class _KeepAndNorm(torch.autograd.Function):
    """`(x, norm of x)`, for which one gradient of x comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x `[..., dim]`, scale `[dim]` of x's dtype."""
        normed, rstd = torch.ops.aten._fused_rms_norm.default(x, scale.shape, scale, eps)
        ctx.save_for_backward(x, scale, rstd)
        ctx.set_materialize_grads(False)
        return x.view_as(x), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of scale."""
        x, scale, rstd = ctx.saved_tensors
        if grad is None:
            return of_stream, None, None
        shape = -1, x.shape[-1]
        residual = None if of_stream is None else of_stream.reshape(shape)
        grad_x, grad_scale = producers.rms_norm_backward(
            [grad.reshape(shape)], x.reshape(shape), scale, rstd.flatten(), residual
        )
        return grad_x.view(x.shape), grad_scale, None
