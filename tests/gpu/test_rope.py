"""The rotary embedding's kernel on a GPU: bit for bit the reference, eager and compiled, and in a model."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels.rope import reference, rotate
from titan_fp8.models import rope
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims, YarnScaling
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.models.rope import RopeTables, RotaryEmbedding, apply_rope, rotate_queries_and_keys
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # Inductor's advice
]
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def _tables(seq_len: int, head_dim: int, scaling: YarnScaling | None = None) -> RopeTables:
    return RotaryEmbedding(head_dim, seq_len, theta=500000.0, scaling=scaling)(seq_len, CUDA)


def _projected(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seq_len: int = 63) -> list[Tensor]:
    """q `[3, S, heads, head_dim]` and k, parts of one wider projection."""
    generator = torch.Generator(CUDA).manual_seed(0)
    width = (heads + 2 * kv_heads) * head_dim
    wide = torch.randn(3, seq_len, width, device=CUDA, generator=generator).to(dtype)
    q, k, _ = wide.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    return [x.unflatten(-1, (-1, head_dim)) for x in (q, k)]


@DTYPES
@pytest.mark.parametrize("head_dim", [6, 64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 1), (3, 3), (64, 8), (1, 1)])
def test_the_kernel_equals_the_reference(dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int) -> None:
    tables = _tables(63, head_dim)
    both = _projected(heads, kv_heads, head_dim, dtype)
    tokens_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in both]
    for xs in (both, both[:1], [x.contiguous() for x in both], tokens_first):
        for inverse in (False, True):
            for x, y in zip(xs, rotate(xs, tables.cos, tables.sin, inverse=inverse), strict=True):
                assert y.is_contiguous()
                assert torch.equal(y, reference.rotate(x, tables.cos, tables.sin, inverse=inverse))


def test_tensors_beyond_32_bits_are_turned_to_their_end() -> None:
    tables = _tables(8192, 128)
    x = torch.zeros(66, 8192, 32, 128, device=CUDA, dtype=torch.bfloat16)  # 2.2e9 values
    x[-1] = torch.randn(8192, 32, 128, device=CUDA)
    (y,) = rotate([x], tables.cos, tables.sin)
    assert not y[0].any()
    assert torch.equal(y[-1:], reference.rotate(x[-1:], tables.cos, tables.sin))


@DTYPES
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_rotation(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    tables = _tables(63, 128, YarnScaling(4.0, 32.0, 1.0, original_max_position=16, sharpening=1.14))
    ours = torch.compile(rotate_queries_and_keys, fullgraph=True) if compiled else rotate_queries_and_keys
    results = []
    for function in (ours, lambda q, k, tables: (apply_rope(q, tables), apply_rope(k, tables))):
        q, k = (x.detach().requires_grad_() for x in _projected(32, 8, 128, dtype))
        outputs = function(q, k, tables)
        grads = [torch.randn(y.shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1)) for y in outputs]
        # As attention's backward lays them out: heads before tokens.
        grads = [g.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
        torch.autograd.backward(outputs, grads)
        results.append({"q": outputs[0], "k": outputs[1], "grad_q": q.grad, "grad_k": k.grad})
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


def _run(mode: str, *, compiled: bool) -> dict[str, Tensor]:
    torch._dynamo.reset()
    dims = ModelDims(dim=512, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=256)
    model = Decoder(dims, compute_dtype=torch.bfloat16, attention_backend="math").to(CUDA)
    initialize(model, seed=3)
    section = ActivationCheckpointSection(mode=mode, selective_ac_option="op")
    apply_activation_checkpointing(model, section, compile_config=CompileSection(enable=compiled))
    if compiled:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, fullgraph=True)
    tokens = torch.randint(512, (2, 257), device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))
    loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_models_loss_and_gradients_are_those_of_the_plain_rotation(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel, compiled = _run(mode, compiled=False), _run(mode, compiled=True)
    monkeypatch.setattr(rope, "_is_for_kernel", lambda x: False)
    for name, expected in _run("none", compiled=False).items():
        # Sums of the embedding's gradient come in any order.
        torch.testing.assert_close(by_kernel[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        error = (compiled[name].float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.03, name
