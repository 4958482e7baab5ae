"""Fused blocks under FSDP2, in whatever units: gradients are those of one process."""

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_distributed
from tests.unit.converters.fused_models import build, run
from titan_fp8.models.decoder import Decoder
from titan_fp8.quantization.recipes import RECIPES

UNITS = {
    "blocks": (),
    "norms by themselves": ("attention_norm", "ffn_norm"),
    "attention and feed-forward by themselves": ("attention", "feed_forward"),
}


def _shard(model: Decoder, parts: tuple[str, ...], world_size: int) -> Decoder:
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model.layers.values():
        for part in parts:
            fully_shard(getattr(block, part), mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _train(rank: int, world_size: int, recipe: str) -> list[str]:
    """Names of what differs. All ranks have the same batch, so the mean of their gradients is that of one."""
    expected = run(build(recipe, fused=True, n_layers=2))
    wrong = []
    for name, parts in UNITS.items():
        results = run(_shard(build(recipe, fused=True, n_layers=2), parts, world_size))
        assert results.keys() == expected.keys()
        for key, value in results.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            # Parts with hooks of their own are fused less, and round once more.
            tolerance = 0.05 if parts else 1e-6
            if not (whole - expected[key]).norm() <= tolerance * expected[key].norm():
                wrong.append(f"{name}: {key}")
    return wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_fused_blocks_are_those_of_one_process_in_any_units(recipe: str) -> None:
    for wrong in run_distributed(_train, 2, recipe):
        assert wrong == []
