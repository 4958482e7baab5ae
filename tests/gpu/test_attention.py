"""Attention and initialization on a GPU: backends equal the float64 formula, documents stay apart, no recompiles."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_fp8.models.attention_backends import AttentionTask, attention_mask, causal_attention, resolve_backend
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.runtime.device import detect_device
from titan_fp8.runtime.errors import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]
CUDA = torch.device("cuda")
# Largest error over the largest value, against float64 on the same bf16 inputs.
TOLERANCE = {"output": 1e-2, "q": 2e-2, "k": 2e-2, "v": 2e-2}
DIMS = ModelDims(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=1024)


def _runnable(backend: str, dtype: torch.dtype, head_dim: int, document_masking: bool) -> bool:
    try:
        resolve_backend(backend, AttentionTask(detect_device(), dtype, head_dim, document_masking))
    except UserError:
        return False
    return True


def _qkv(
    seq_len: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, value_dim: int | None = None
) -> list[Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim))
    return [
        torch.randn(2, seq_len, h, width, device=CUDA, dtype=dtype, generator=generator)
        .transpose(1, 2)  # the layout that the model hands over
        .requires_grad_()
        for h, width in shapes
    ]


def _formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def _assert_equals_formula(inputs: list[Tensor], actual: Tensor, allowed: Tensor) -> None:
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = _formula(*exact, allowed)
    weight = torch.randn(expected.shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))
    gradients = torch.autograd.grad((actual.float() * weight).sum(), inputs)
    references = torch.autograd.grad((expected * weight).sum(), exact)
    pairs = zip(TOLERANCE, (actual, *gradients), (expected, *references), strict=True)
    for name, value, reference in pairs:
        error = ((value.double() - reference).abs().max() / reference.abs().max()).item()
        assert error < TOLERANCE[name], f"{name}: {error}"


@pytest.mark.parametrize("backend", ["math", "flash", "efficient", "cudnn", "flash4", "flex"])
@pytest.mark.parametrize(
    ("seq_len", "heads", "kv_heads", "head_dim"), [(63, 16, 16, 16), (1000, 8, 2, 64), (256, 4, 1, 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_causal_attention_equals_the_formula(
    backend: str, seq_len: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    if not _runnable(backend, dtype, head_dim, document_masking=False):
        pytest.skip(f"{backend} does not run in {dtype} here")
    torch.compiler.reset()
    inputs = _qkv(seq_len, heads, kv_heads, head_dim, dtype)
    actual = causal_attention(*inputs, backend=backend, mask=attention_mask(backend, seq_len, CUDA, None))
    assert actual.dtype == dtype
    _assert_equals_formula(inputs, actual, torch.ones(seq_len, seq_len, dtype=torch.bool, device=CUDA).tril())


@pytest.mark.parametrize("backend", ["math", "flash", "efficient", "cudnn", "flex"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (24, 32), (12, 14), (64, 128), (192, 128), (192, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_over_values_of_another_width_equals_the_formula(
    backend: str, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    if not _runnable(backend, dtype, max(head_dim, value_dim), document_masking=False):
        pytest.skip(f"{backend} does not run in {dtype} here")
    torch.compiler.reset()
    inputs = _qkv(200, 4, 2, head_dim, dtype, value_dim)
    actual = causal_attention(*inputs, backend=backend, mask=attention_mask(backend, 200, CUDA, None))
    assert actual.shape == (2, 4, 200, value_dim)
    _assert_equals_formula(inputs, actual, torch.ones(200, 200, dtype=torch.bool, device=CUDA).tril())


@pytest.mark.parametrize("backend", ["math", "efficient", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_attention_equals_the_formula(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    inputs = _qkv(1000, 8, 2, 64, dtype)
    ids = torch.stack([torch.arange(1000) // 130, torch.arange(1000) // 999]).int().to(CUDA)
    actual = causal_attention(*inputs, backend=backend, mask=attention_mask(backend, ids.shape[1], ids.device, ids))
    allowed = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(1000, 1000, device=CUDA).tril().bool()
    _assert_equals_formula(inputs, actual, allowed)


def _loss_and_gradients(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = cross_entropy_sum(model(*inputs), inputs[0].roll(-1, 1)) / inputs[0].numel()
    loss.backward()
    return loss.detach(), {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()
    }


def _model(**options) -> Decoder:
    with torch.device("meta"):
        model = Decoder(DIMS, **options)
    model.to_empty(device=CUDA)
    initialize(model, seed=0)
    return model


def _batch(seed: int, masked: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, DIMS.vocab_size, (2, 512), generator=generator)
    ends = (torch.rand(2, 512, generator=generator) < 0.02).int().cumsum(1).int()
    return (tokens.to(CUDA), ends.to(CUDA)) if masked else (tokens.to(CUDA),)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_automatic_backend_trains_like_the_reference(dtype: torch.dtype | None, masked: bool) -> None:
    torch.compiler.reset()
    batch = _batch(0, masked)
    options = {"document_masking": masked, "compute_dtype": dtype}
    loss, gradients = _loss_and_gradients(_model(**options), *batch)
    reference_loss, references = _loss_and_gradients(_model(attention_backend="math", **options), *batch)
    tolerance = 1e-4 if dtype is None else 2e-2
    torch.testing.assert_close(loss, reference_loss, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        error = ((gradient - references[name]).norm() / references[name].norm()).item()
        assert error < max(tolerance, 1e-3), f"{name}: {error}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_break_no_graph_equal_eager_and_do_not_recompile(masked: bool, checkpointed: bool) -> None:
    torch.compiler.reset()
    options = {"document_masking": masked, "compute_dtype": torch.bfloat16}
    eager, compiled = _model(**options), _model(**options)
    for key, block in compiled.layers.items():
        compiled.layers[key] = checkpoint_wrapper(block) if checkpointed else block
        compiled.layers[key].compile(fullgraph=True)
    loss, gradients = _loss_and_gradients(compiled, *_batch(0, masked))
    expected_loss, expected = _loss_and_gradients(eager, *_batch(0, masked))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        error = ((gradient - expected[name]).norm() / expected[name].norm()).item()
        assert error < 3e-2, f"{name}: {error}"
    with torch.compiler.set_stance("fail_on_recompile"):
        _loss_and_gradients(compiled, *_batch(1, masked))


@pytest.mark.parametrize("masked", [False, True])
def test_eager_batches_do_not_recompile_masks_or_flex_attention(masked: bool) -> None:
    torch.compiler.reset()
    model = _model(attention_backend="flex", document_masking=masked, compute_dtype=torch.bfloat16)
    _loss_and_gradients(model, *_batch(0, masked))
    with torch.compiler.set_stance("fail_on_recompile"):
        _loss_and_gradients(model, *_batch(1, masked))


def test_deterministic_algorithms_choose_a_backend_that_repeats_bit_for_bit() -> None:
    task = AttentionTask(detect_device(), torch.bfloat16, 64, deterministic=True)
    backend = resolve_backend("auto", task)
    inputs = _qkv(1000, 8, 2, 64, torch.bfloat16)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(causal_attention(*inputs, backend=backend).float().square().sum(), inputs)

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip("qkv", first, second, strict=True):
        assert torch.equal(a, b), name


def test_shards_on_a_gpu_are_slices_of_the_whole() -> None:
    whole = {name: p.detach() for name, p in _model().named_parameters()}
    for rank in range(3):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            with torch.device("meta"):
                model = Decoder(DIMS)
            fully_shard(model, mesh=init_device_mesh("cuda", (3,), mesh_dim_names=(f"shard_{rank}",)))
            model.to_empty(device=CUDA)
            initialize(model, seed=0)
        finally:
            dist.destroy_process_group()
        for name, p in model.named_parameters():
            rows = -(-whole[name].shape[0] // 3)
            assert torch.equal(p.to_local(), whole[name][rank * rows : (rank + 1) * rows]), name


def test_initialization_fills_more_than_200_million_parameters_a_second() -> None:
    with torch.device("meta"):
        model = Decoder(replace(resolve_dims("llama3", "8B"), n_layers=1))
    model.to_empty(device=CUDA)
    initialize(model, seed=0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    initialize(model, seed=1)
    torch.cuda.synchronize()
    assert sum(p.numel() for p in model.parameters()) / (time.perf_counter() - start) > 2e8
