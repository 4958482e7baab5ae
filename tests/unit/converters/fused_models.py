"""Tiny float8 decoders for the tests of fusion: fused, unfused, and unfused but rounded where the fused ones round."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_fp8.converters.fusion import fuse_producers
from titan_fp8.kernels.producers import reference
from titan_fp8.models.attention import Attention
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.feed_forward import FeedForward
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.models.norm import RMSNorm
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

DIMS = {"dim": 128, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 256, "vocab_size": 64, "max_seq_len": 32}


def build(
    recipe: str | None,
    *,
    fused: bool,
    n_layers: int = 1,
    skip: Callable[[str], bool] | None = None,
    emulate: bool = True,
    attention_backend: str = "auto",
) -> Decoder:
    """A decoder whose blocks' linears run in `recipe`, but for those whose name `skip` says yes to."""
    dims = ModelDims(n_layers=n_layers, **DIMS)
    model = Decoder(dims, compute_dtype=torch.bfloat16, attention_backend=attention_backend)
    if recipe is not None:
        config = Float8Config(RECIPES[recipe], emulate=emulate)
        linears = [(name, module) for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            parent, _, child = name.rpartition(".")
            if skip is None or not skip(name):
                setattr(model.layers.get_submodule(parent), child, Float8Linear.from_linear(linear, config))
    initialize(model, seed=3)
    if fused:
        fuse_producers(model)
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    """Loss and every gradient by name."""
    model.zero_grad()
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(model.parameters()).device)
    loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def exact(n_layers: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of the unquantized model in fp64."""
    # No other backend takes fp64.
    model = build(None, fused=False, n_layers=n_layers, attention_backend="math").double()
    model.compute_dtype = torch.float64
    return run(model)


def same_bits(results: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what differs."""
    assert results.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(results[name], value)]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, readers: int) -> tuple[Tensor, ...]:
        flat = x.flatten(0, -2)
        _, rstd, output = reference.norm_output(flat, None, weight, eps)
        ctx.save_for_backward(flat, weight, rstd)
        return x.clone(), *(output.clone().view(x.shape) for _ in range(readers))

    @staticmethod
    def backward(ctx, of_stream: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        flat = [grad.flatten(0, -2) for grad in (of_stream, *grads)]
        grad_x, grad_weight = reference.norm_backward(flat[1:], x, weight, rstd, flat[0])
        return grad_x.view(of_stream.shape), grad_weight.to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return reference.swiglu_output(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return reference.swiglu_gradients(grad, *ctx.saved_tensors)


class OnceRoundedNorm(RMSNorm):
    """RMSNorm with the fused one's rounding points, in high precision.

    Attributes:
        readers: to so many it gives an output each, so that their gradients come back one by one.
    """

    readers: int

    def keep_and_norm(self, x: Tensor) -> tuple[Tensor, Any]:
        stream, *normed = _Norm.apply(x, self.weight, self.eps, self.readers)
        return stream, normed if self.readers > 1 else normed[0]


class OnceRoundedAttention(Attention):
    """Attention whose projections each read an output of the norm."""

    def project(self, x: Any) -> tuple[Tensor, ...]:
        q, k, v = x
        return self.wq(q), self.wk(k), self.wv(v)


class OnceRoundedFeedForward(FeedForward):
    """SwiGLU with the fused one's rounding points, in high precision."""

    def hidden(self, x: Any) -> Tensor:
        gate, up = x
        return _SwiGLU.apply(self.w1(gate), self.w3(up))


def round_once(model: Decoder) -> Decoder:
    """Give an unfused model the rounding points of what would be fused in it."""
    for block in model.layers.values():
        block.attention_norm.__class__ = block.ffn_norm.__class__ = OnceRoundedNorm
        block.attention_norm.readers = block.ffn_norm.readers = 1
        if block.feed_forward.w1.config.recipe.grad_weight_in_float8:
            block.attention_norm.readers, block.ffn_norm.readers = 3, 2
            block.attention.__class__ = OnceRoundedAttention
            block.feed_forward.__class__ = OnceRoundedFeedForward
    return model
