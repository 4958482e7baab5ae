"""Models with fused producers on a GPU: as exact as without, repeatable, compiled or not, in less memory."""

import pytest
import torch

from tests.tolerances import FUSED_VS_EAGER_SQNR_DB, FUSED_VS_UNFUSED_LOSS_DB, sqnr_db
from tests.unit.converters.fused_models import build, exact, run, same_bits
from titan_fp8.models.decoder import Decoder
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores"),
]

ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)


def on_gpu(recipe: str, *, fused: bool = True) -> Decoder:
    return build(recipe, fused=fused, n_layers=2, emulate=False).cuda()


@ALL_RECIPES
def test_a_fused_model_is_as_exact_as_one_that_is_not(recipe: str) -> None:
    fused, unfused = (run(on_gpu(recipe, fused=fused)) for fused in (True, False))
    true = exact(n_layers=2)
    losses = []
    for name, value in unfused.items():
        if name != "loss":
            assert sqnr_db(value.cpu(), fused[name].cpu()) > FUSED_VS_EAGER_SQNR_DB, name
            losses.append(sqnr_db(true[name], value.cpu()) - sqnr_db(true[name], fused[name].cpu()))
    assert sum(losses) / len(losses) < FUSED_VS_UNFUSED_LOSS_DB


@ALL_RECIPES
def test_steps_of_a_fused_model_repeat_and_checkpointing_changes_no_bit(recipe: str) -> None:
    model = on_gpu(recipe)
    expected = run(model)
    assert same_bits(run(model), expected) == []
    section = ActivationCheckpointSection(mode="full")
    apply_activation_checkpointing(model, section, compile_config=CompileSection())
    assert same_bits(run(model), expected) == []


@ALL_RECIPES
def test_a_compiled_fused_model_computes_what_the_eager_one_does(recipe: str) -> None:
    torch._dynamo.reset()
    model = on_gpu(recipe)
    expected = run(model)
    for block in model.layers.values():
        block.compile(fullgraph=True)
    for name, value in run(model).items():
        assert sqnr_db(expected[name], value) > FUSED_VS_EAGER_SQNR_DB, name


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.grad_weight_in_float8])
def test_a_fused_feed_forward_needs_less_memory(recipe: str) -> None:
    peaks = []
    for fused in (True, False):
        block = on_gpu(recipe, fused=fused).layers["0"]
        x = torch.randn(8, 16384, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        block.feed_forward(block.ffn_norm(x[:1])).sum().backward()  # what libraries take for good, and the gradients
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block.feed_forward(block.ffn_norm(x)).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del block, x
    assert peaks[0] < peaks[1]
