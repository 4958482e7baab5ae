"""A float8 head that computes the loss some tokens at a time on tensor cores: as exact as one that computes all logits,
in less memory."""

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import FUSED_VS_EAGER_SQNR_DB, FUSED_VS_UNFUSED_LOSS_DB, sqnr_db
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.quantization import gemm
from titan_fp8.quantization.chunked_head import Float8ChunkedHead, chunk_float8_loss
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores"),
]

TOKENS, FEATURES, WORDS = (2, 1000), 512, 50304
RECIPE = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True)
def _native(request: pytest.FixtureRequest) -> None:
    if "blockwise" in request.node.name and not gemm.blockwise_is_native(torch.device("cuda")):
        pytest.skip("needs SM90 and CUDA 12.9 for blockwise products")


def make(recipe: str, chunk: int | None = None, *, emulate: bool = False) -> Float8Linear:
    torch.manual_seed(0)
    linear = nn.Linear(FEATURES, WORDS, bias=False, device="cuda")
    head = Float8Linear.from_linear(linear, Float8Config(RECIPES[recipe], emulate=emulate))
    if chunk is not None:
        chunk_float8_loss(head, chunk)
    return head


def run(head: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], int]:
    """The loss and every gradient by name, and the memory that they took."""
    torch.manual_seed(1)
    labels = torch.randint(WORDS, TOKENS, device="cuda")
    labels[1, 5:9] = -100
    x = torch.randn(*TOKENS, FEATURES, device="cuda").bfloat16().to(dtype).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = head(x, labels) if isinstance(head, Float8ChunkedHead) else cross_entropy_sum(head(x), labels)
    (loss / 257).backward()  # no power of two
    peak = torch.cuda.max_memory_allocated() - before
    assert x.grad is not None
    assert head.weight.grad is not None
    return {"loss": loss.detach(), "grad_input": x.grad, "grad_weight": head.weight.grad}, peak


def exact(recipe: str) -> dict[str, Tensor]:
    """What high precision computes."""
    linear = nn.Linear(FEATURES, WORDS, bias=False, device="cuda")
    linear.load_state_dict(make(recipe).state_dict())
    return run(linear, torch.float32)[0]


@RECIPE
@pytest.mark.parametrize("chunk", [512, 700, 5000])
def test_it_is_as_exact_as_all_logits_at_once(recipe: str, chunk: int) -> None:
    (actual, _), (whole, _), true = run(make(recipe, chunk)), run(make(recipe)), exact(recipe)
    torch.testing.assert_close(actual["loss"], whole["loss"], rtol=1e-5, atol=0)
    for name in ("grad_input", "grad_weight"):
        assert actual[name].dtype == whole[name].dtype
        assert sqnr_db(whole[name], actual[name]) > FUSED_VS_EAGER_SQNR_DB, name
        assert sqnr_db(true[name], actual[name]) > sqnr_db(true[name], whole[name]) - FUSED_VS_UNFUSED_LOSS_DB, name


@RECIPE
def test_tensor_cores_and_their_emulation_agree(recipe: str) -> None:
    native, emulated = (run(make(recipe, 700, emulate=emulate))[0] for emulate in (False, True))
    torch.testing.assert_close(native["loss"], emulated["loss"], rtol=1e-4, atol=0)
    for name in ("grad_input", "grad_weight"):
        assert sqnr_db(emulated[name], native[name]) > FUSED_VS_EAGER_SQNR_DB, name


@RECIPE
def test_it_needs_less_memory_and_repeats_bit_for_bit(recipe: str) -> None:
    (first, peak), (second, _), (_, whole_peak) = (run(make(recipe, chunk)) for chunk in (512, 512, None))
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    assert peak < 0.6 * whole_peak
