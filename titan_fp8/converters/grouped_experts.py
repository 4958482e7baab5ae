"""The modules of the conversion `quantize.grouped_mm.float8`: experts that multiply in float8."""

from torch import Tensor, nn

from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.grouped import Float8GroupedConfig, grouped_feed_forward


class Float8Experts(Experts):
    """Experts whose products run in float8. The parameters are the same objects, in high precision.

    Attributes:
        config: how they compute.
        reads_master_weights: codes are computed from the bits of the parameters, so nobody may round these before.
    """

    config: Float8GroupedConfig
    reads_master_weights = True

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """As in `Experts`; groups are multiples of 16 rows."""
        return grouped_feed_forward(x, *self.weights(), ends, self.config)

    def extra_repr(self) -> str:
        """The recipe, and whether it is emulated."""
        return f"rowwise{', emulated' if self.config.emulate else ''}"


def convert_experts(layer: MoE, config: Float8GroupedConfig, alignment: int) -> None:
    """Let the experts of a layer multiply in float8, and its dispatcher make groups for that."""
    layer.experts = _converted(layer.experts, config)
    layer.dispatcher.alignment = alignment


def _converted(experts: Experts, config: Float8GroupedConfig) -> Float8Experts:
    converted = Float8Experts.__new__(Float8Experts)
    converted.__dict__.update(experts.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        converted.__dict__[table] = dict(experts.__dict__[table])
    converted.config = config
    return converted


def experts_of(model: nn.Module) -> dict[str, tuple[MoE, Experts]]:
    """Name -> (layer, its experts) of each mixture of experts of a model."""
    found: dict[str, tuple[MoE, Experts]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, MoE):
            found[f"{fqn}.experts" if fqn else "experts"] = (module, module.experts)
    return found
