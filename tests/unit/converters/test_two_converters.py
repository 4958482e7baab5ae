"""Two converters in one job: each casts its own weights ahead, once an optimizer step, and leaves the other's alone."""

from unittest import mock

import pytest
import torch

from tests.unit.converters.models import CPU
from tests.unit.converters.test_float8_grouped import GROUPED, LINEAR, build
from titan_fp8.converters import build_converters
from titan_fp8.converters.config import Float8GroupedSection, Float8LinearSection, QuantizeSection
from titan_fp8.converters.protocol import Placement
from titan_fp8.quantization import fsdp_weight, sharded_weight


@pytest.mark.parametrize("order", [[LINEAR, GROUPED], [GROUPED, LINEAR]], ids=["linears first", "experts first"])
def test_each_weight_is_cast_once_a_step_and_is_fresh_after_it(order: list[str]) -> None:
    linear = Float8LinearSection(
        recipe_name="rowwise",
        filter_fqns=["output"],
        emulate=True,
        enable_fsdp_float8_all_gather=True,
        precompute_float8_dynamic_scale_for_fsdp=True,
    )
    section = QuantizeSection.model_validate(
        {"linear": {"float8": linear}, "grouped_mm": {"float8": Float8GroupedSection(fqns="experts", emulate=True)}}
    )
    model = build()
    converters = build_converters(order, section, CPU, Placement(ranks=2, shards=2))
    for converter in converters:
        converter.convert(model)
    states = [state for module in model.modules() for _, state in fsdp_weight.states_of(module)]
    weights = [w for w in model.parameters() if isinstance(w, sharded_weight.ShardableFloat8Weight)]
    assert len(states) == len(weights) > 6
    cast: list[int] = []

    def cast_ahead(modules):
        """As where FSDP shards the weights, which here it does not."""
        stale = [s for m in modules for _, s in fsdp_weight.states_of(m)]
        chosen = [w for w in weights if w.state in stale and not w.state.serves(w)]
        cast.append(len(chosen))
        if chosen:
            alone = sharded_weight.ShardAxis(None, 0, 1)
            sharded_weight.refresh(chosen, [w.shape for w in chosen], alone, ahead=True)

    with (
        mock.patch("titan_fp8.converters.float8_linear.cast_ahead", cast_ahead),
        mock.patch("titan_fp8.converters.float8_grouped.cast_ahead", cast_ahead),
    ):
        for converter in converters:
            converter.pre_training([model])
        for _ in range(2):
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1.5)
            for converter in converters:
                converter.post_optimizer([model])
            assert all(weight.state.serves(weight) for weight in weights)
    assert sum(cast) == 3 * len(weights)
