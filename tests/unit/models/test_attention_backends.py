"""Attention: the rule that chooses a backend, refusals, agreement of backends, documents kept apart."""

import pytest
import torch

from titan_fp8.models.attention_backends import AttentionTask, attention_mask, causal_attention, resolve_backend
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError


def _device(capability: tuple[int, int] | None, name: str = "GPU") -> DeviceCapabilities:
    return DeviceCapabilities("cuda", name, capability, False, None, None, None)


CPU = DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
HOPPER = _device((9, 0), "NVIDIA H200")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("task", "backend"),
    [
        (AttentionTask(CPU, BF16, 64), "flash"),
        (AttentionTask(CPU, FP32, 64, document_masking=True), "flash"),
        (AttentionTask(HOPPER, BF16, 128), "cudnn"),
        (AttentionTask(_device((10, 0)), BF16, 64), "cudnn"),
        (AttentionTask(HOPPER, BF16, 128, document_masking=True), "flex"),
        (AttentionTask(HOPPER, FP32, 128, document_masking=True), "flex"),
        (AttentionTask(HOPPER, BF16, 128, deterministic=True), "flash"),
        (AttentionTask(HOPPER, BF16, 256), "flash"),
        (AttentionTask(HOPPER, FP32, 128), "efficient"),
        (AttentionTask(_device((8, 0)), BF16, 128), "flash"),
        (AttentionTask(_device((12, 0)), BF16, 128), "flash"),
        (AttentionTask(_device((7, 5)), torch.float16, 128), "efficient"),
        (AttentionTask(_device(None, "AMD MI300X"), BF16, 128), "flash"),
    ],
)
def test_auto_follows_the_table(task: AttentionTask, backend: str) -> None:
    assert resolve_backend("auto", task) == backend
    assert resolve_backend(backend, task) == backend  # what auto chooses can also be asked for


@pytest.mark.parametrize(
    ("requested", "task", "reason"),
    [
        ("cudnn", AttentionTask(CPU, BF16, 64), r'"cudnn" cannot run here: it needs a CUDA device.*math, flash'),
        ("flex", AttentionTask(CPU, BF16, 64), "it needs a CUDA device"),
        ("efficient", AttentionTask(CPU, BF16, 64), "it needs a CUDA device"),
        ("flash", AttentionTask(HOPPER, FP32, 64), "bfloat16 or float16, not float32"),
        ("flash", AttentionTask(HOPPER, BF16, 64, document_masking=True), "takes no mask.*document_masking"),
        ("cudnn", AttentionTask(HOPPER, BF16, 136), "multiples of 8 up to 128, and the model's is 136"),
        ("cudnn", AttentionTask(HOPPER, BF16, 64, deterministic=True), r"not deterministic, and debug\.deterministic"),
        ("cudnn", AttentionTask(_device((7, 5), "Tesla T4"), BF16, 64), "compute capability 8.0, and Tesla T4"),
        ("cudnn", AttentionTask(_device(None, "AMD MI300X"), BF16, 64), "needs an NVIDIA GPU"),
        ("flsh", AttentionTask(CPU, BF16, 64), r'not one of auto, math.*did you mean "flash"'),
    ],
)
def test_a_backend_that_cannot_run_is_refused_by_name(requested: str, task: AttentionTask, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve_backend(requested, task)


def test_the_decoder_refuses_it_when_it_is_built() -> None:
    with pytest.raises(UserError, match=r'attention_backend = "cudnn"'), torch.device("meta"):
        Decoder(ModelDims(dim=32, n_layers=1, n_heads=2), attention_backend="cudnn", device=CPU)


def test_the_decoder_asks_for_a_deterministic_backend_in_deterministic_mode() -> None:
    dims = ModelDims(dim=32, n_layers=1, n_heads=2)
    options = {"device": HOPPER, "compute_dtype": BF16}
    with torch.device("meta"):
        assert Decoder(dims, **options).attention_backend == "cudnn"
        torch.use_deterministic_algorithms(True)
        try:
            assert Decoder(dims, **options).attention_backend == "flash"
        finally:
            torch.use_deterministic_algorithms(False)


def _qkv(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 63, 16, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("backend", ["math", "flash"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_causal_attention_equals_the_formula(backend: str, kv_heads: int) -> None:
    inputs = _qkv(kv_heads)
    q, k, v = inputs
    k, v = (t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(~torch.ones(63, 63, dtype=torch.bool).tril(), float("-inf"))
    expected = scores.softmax(-1) @ v
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    actual = causal_attention(*inputs, backend=backend)
    torch.testing.assert_close(actual, expected)
    for name, gradient, reference in zip(
        "qkv", torch.autograd.grad((actual * weight).sum(), inputs), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_document_mask_is_causal_within_a_document_and_empty_across() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])
    mask = attention_mask("math", ids.shape[1], ids.device, ids)
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, expected[None, None])
    assert attention_mask("math", ids.shape[1], ids.device, None) is None


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_masked_documents_equal_each_document_run_alone(backend: str) -> None:
    lengths = ((5, 17, 11), (1, 30, 2))  # two rows of 33 tokens
    dims = ModelDims(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, max_seq_len=64)
    model = Decoder(dims, attention_backend=backend, document_masking=True)
    initialize(model, seed=0)
    tokens = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 33, 101, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in lengths]).int()
    packed = model(tokens, ids)
    (packed * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, row_lengths in enumerate(lengths):
        for span in torch.arange(33).split(row_lengths):
            alone = model(tokens[row : row + 1, span])
            torch.testing.assert_close(packed[row, span], alone[0], rtol=1e-4, atol=1e-5)
            (alone * weight[row, span]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(packed, model(tokens), rtol=1e-2, atol=1e-2)
