"""The cross-entropy's kernel and the chunked loss on a GPU."""

import pytest
import torch

from titan_fp8.kernels.cross_entropy import cross_entropy_, reference
from titan_fp8.kernels.cross_entropy.chunks import narrow_
from titan_fp8.models.chunked_loss import chunk_loss
from titan_fp8.models.linear import Linear
from titan_fp8.models.loss import cross_entropy_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [17, 4096, 128256])
def test_the_kernel_equals_the_reference(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(64, vocabulary, device="cuda") * 4).to(dtype)
    labels = torch.randint(vocabulary, (64,), device="cuda")
    labels[3], labels[5], labels[7] = -100, vocabulary, -1
    ours, theirs = logits.clone(), logits.clone()
    losses, expected = cross_entropy_(ours, labels, grad=True), reference.cross_entropy(theirs, labels, grad=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=2e-6, equal_nan=True)
    kept = logits.clone()
    assert torch.equal(cross_entropy_(kept, labels, grad=False)[:3], losses[:3])
    assert torch.equal(kept, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_of_some_tokens_at_a_time_is_that_of_all_in_less_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, chunked = (Linear(512, 50304, bias=False, device="cuda") for _ in range(2))
    chunked.load_state_dict(plain.state_dict())
    chunk_loss(chunked, 256)
    x = torch.randn(2, 1024, 512, device="cuda", dtype=dtype)
    labels = torch.randint(50304, (2, 1024), device="cuda")
    results = []
    for head, loss_of in (
        (chunked, lambda x: chunked(x, labels)),
        (plain, lambda x: cross_entropy_sum(plain(x), labels)),
    ):
        inputs = x.clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = loss_of(inputs)
        (loss / 257).backward()  # no power of two
        results.append((loss.detach(), inputs.grad, head.weight.grad, torch.cuda.max_memory_allocated() - before))
    (loss, grad_x, grad_w, peak), (wanted, wanted_x, wanted_w, wanted_peak) = results
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for actual, expected in ((grad_x, wanted_x), (grad_w, wanted_w)):
        actual, expected = actual.float(), expected.float()
        assert (actual - expected).norm() <= tolerance * expected.norm()
        assert ((actual * expected).sum() / expected.square().sum()).item() == pytest.approx(1, abs=1e-3)
    assert peak < 0.7 * wanted_peak


@pytest.mark.parametrize("numel", [12_345_679, 1 << 28])
def test_a_gradient_is_rounded_in_its_own_memory(numel: int) -> None:
    wide = torch.randn(numel, device="cuda")
    expected = wide.bfloat16()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    narrow = narrow_(wide, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < numel / 16
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == wide.data_ptr()
