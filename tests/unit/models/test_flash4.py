"""FlashAttention 4 as a backend: when it is taken, and what is handed to its kernels, for which formulas stand in."""

import importlib.metadata
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titan_fp8.models import flash4
from titan_fp8.models.attention_backends import AttentionTask, causal_attention, resolve_backend
from titan_fp8.parallel.activation_checkpoint import _per_op_contexts
from titan_fp8.parallel.attention_blocks import block_kernels
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

HOPPER = DeviceCapabilities("cuda", "NVIDIA H200", (9, 0), False, None, None, None)
TASK = AttentionTask(HOPPER, torch.bfloat16, 128)


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Of `[B, S, H, D]`: output and log-sum-exp `[B, H, S]`."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(repeats, dim=1) for each in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels called, with formulas in their places."""
    seen: list[str] = []

    def forward(q, k, v, *, causal, return_lse):
        assert return_lse
        seen.append("forward")
        out, lse = formula(q, k, v, causal)
        return out, lse.contiguous(), None, None, None

    def backward(q, k, v, out, grad, lse, *, causal):
        seen.append("backward")
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (q, k, v)]
            expected, expected_lse = formula(*leaves, causal)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(lse, expected_lse)
            return tuple(each.contiguous() for each in torch.autograd.grad(expected, leaves, grad))

    interface = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setattr(flash4, "_interface", lambda: interface)
    return seen


def test_a_warning_of_the_packages_own_call_is_not_shown_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", SimpleNamespace())
    monkeypatch.setattr(flash4, "_keep_compiled_kernels", lambda: None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        flash4._interface.__wrapped__()
        warnings.warn("Argument aux_data (position 17) cannot be converted to a JitArgument for ...", stacklevel=1)
        warnings.warn("Argument q (position 0) cannot be converted to a JitArgument for ...", stacklevel=1)
    assert [str(each.message)[:10] for each in shown] == ["Argument q"]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True])
def test_output_and_gradients_are_those_of_the_formula(calls: list[str], compiled: bool) -> None:
    torch._dynamo.reset()
    attend = torch.compile(causal_attention, backend="aot_eager", fullgraph=True) if compiled else causal_attention
    mine, others = inputs(), inputs()
    weight = torch.randn(2, 4, 9, 16)
    gradients = torch.autograd.grad((attend(*mine, backend="flash4") * weight).sum(), mine)
    assert calls == ["forward", "backward"]
    expected = causal_attention(*others, backend="math")
    torch.testing.assert_close(causal_attention(*mine, backend="flash4"), expected)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), others), strict=True):
        torch.testing.assert_close(gradient, other)


def test_checkpointing_by_operation_keeps_its_result(calls: list[str]) -> None:
    q, k, v = inputs()
    contexts = lambda: _per_op_contexts(frozenset())  # noqa: E731
    out = checkpoint(
        lambda q: causal_attention(q * 2, k, v, backend="flash4"), q, use_reentrant=False, context_fn=contexts
    )
    out.sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_context_parallelism_have_its_kernels(calls: list[str], causal: bool) -> None:
    kernels = block_kernels("flash4", torch.device("cuda"))
    tensors = [each.detach() for each in inputs()]
    (out, lse), (expected, expected_lse) = (
        kernels.forward(*tensors, causal, None),
        block_kernels("math", torch.device("cpu")).forward(*tensors, causal, None),
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    grad = torch.randn(out.shape)
    gradients = kernels.backward(grad, *tensors, out, lse, causal, None)
    others = block_kernels("math", torch.device("cpu")).backward(grad, *tensors, expected, expected_lse, causal, None)
    for gradient, other in zip(gradients, others[:3], strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_compiler_is_told_shapes_and_strides(calls: list[str]) -> None:
    q, k, v = (each.detach().transpose(1, 2) for each in inputs())
    results = flash4.forward(q, k, v, True)
    meta = flash4.forward(*(each.to("meta") for each in (q, k, v)), True)
    gradients = flash4.backward(results[0], q, k, v, *results, True)
    meta_gradients = flash4.backward(*(each.to("meta") for each in (results[0], q, k, v, *results)), True)
    for real, fake in zip((*results, *gradients), (*meta, *meta_gradients), strict=True):
        assert (real.shape, real.dtype, real.is_contiguous()) == (fake.shape, fake.dtype, fake.is_contiguous())


@pytest.mark.parametrize(
    ("installed", "reason"),
    [(None, r"flash-attn-4 is not installed \(pip install"), ("4.0.0", "and 4.0.0 is installed")],
)
def test_it_is_refused_without_the_version_that_is_known(
    installed: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=reason):
        resolve_backend("flash4", TASK)
    assert resolve_backend("auto", TASK) == "cudnn"


def test_auto_takes_it_on_hopper_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: flash4.VERSION)
    assert resolve_backend("auto", TASK) == resolve_backend("flash4", TASK) == "flash4"
    blackwell = DeviceCapabilities("cuda", "NVIDIA B200", (10, 0), False, None, None, None)
    for other, instead, reason in (
        (AttentionTask(blackwell, torch.bfloat16, 128), "cudnn", "compute capability 9.0 alone"),
        (AttentionTask(HOPPER, torch.bfloat16, 128, deterministic=True), "flash", "not deterministic"),
        (AttentionTask(HOPPER, torch.bfloat16, 256), "flash", "up to 128"),
        (AttentionTask(HOPPER, torch.float32, 128), "efficient", "bfloat16 or float16"),
        (AttentionTask(HOPPER, torch.bfloat16, 128, document_masking=True), "flex", "takes no mask"),
    ):
        assert resolve_backend("auto", other) == instead
        with pytest.raises(UserError, match=reason):
            resolve_backend("flash4", other)
