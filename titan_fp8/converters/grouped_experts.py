"""The modules of the conversion `quantize.grouped_mm.float8`: experts that multiply in float8."""

from collections.abc import Sequence

from torch import Tensor, nn

from titan_fp8.kernels.moe.functions import Rows
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.casts import Codes
from titan_fp8.quantization.fsdp_weight import check_gathered, wrap_experts_for_fsdp
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.grouped import ExpertCache, Float8GroupedConfig, cast_experts, grouped_feed_forward
from titan_fp8.quantization.linear import with_state_of
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.quantization.weights import StepWatch, refresh_before_forward, watch_module

ORDER = ("w1", "w3", "w2")
"""The parameters of experts as `Experts.weights` gives them."""


class Float8Experts(Experts):
    """Experts whose products run in float8. The parameters are the same objects, in high precision.

    Attributes:
        config: how they compute.
        weight_caches: parameter -> its codes, kept from one optimizer step to the next; None: they are not.
        fsdp_weight_states: parameter -> what is known of it, if it is made to be gathered as codes
            (`wrap_experts_for_fsdp`).
    """

    config: Float8GroupedConfig
    weight_caches: dict[str, ExpertCache] | None = None
    fsdp_weight_states: dict[str, Float8WeightState] | None = None

    @property
    def reads_master_weights(self) -> bool:
        """Whether codes are computed from the bits of the gathered parameters, which nobody may round before."""
        return self.fsdp_weight_states is None

    def forward(self, x: Tensor | Rows, ends: Tensor) -> Tensor:
        """As in `Experts`; groups are multiples of 16 rows."""
        weights = self.weights()
        return grouped_feed_forward(x, weights, self._codes(weights), ends, self.config)

    def _codes(self, weights: Sequence[Tensor]) -> list[Codes]:
        if self.fsdp_weight_states is not None:
            return [_gathered_codes(weight) for weight in weights]
        if self.weight_caches is None:
            return [cast_experts(weight) for weight in weights]
        codes = []
        for name in ORDER:
            cache = self.weight_caches[name]
            cache.use(getattr(self, name))
            assert cache.rows is not None
            codes.append(cache.rows)
        return codes

    def extra_repr(self) -> str:
        """The recipe, and whether it is emulated."""
        return f"rowwise{', emulated' if self.config.emulate else ''}"


def _gathered_codes(weight: Tensor) -> Codes:
    """Of a weight made for float8 all-gather: what was gathered; where nobody shards it, what it is cast to."""
    if isinstance(weight, GatheredFloat8Weight):
        return Codes(weight.codes, weight.scale)
    check_gathered(weight, of="a layer of experts")
    return cast_experts(weight)


def convert_experts(layer: MoE, config: Float8GroupedConfig, alignment: int) -> None:
    """Let the experts of a layer multiply in float8, and its dispatcher make groups for that."""
    layer.experts = _converted(layer.experts, config)
    layer.dispatcher.alignment = alignment


def _converted(experts: Experts, config: Float8GroupedConfig) -> Float8Experts:
    converted = with_state_of(experts, Float8Experts)
    converted.config = config
    return converted


def gather_codes_of_experts(model: nn.Module) -> None:
    """Let FSDP gather the weights of the converted experts of `model` as codes, made once an optimizer step."""
    wrap_experts_for_fsdp([module for module in model.modules() if isinstance(module, Float8Experts)], ORDER)


def cache_experts(model: nn.Module) -> None:
    """Let the converted experts of `model` keep the codes of their weights from one optimizer step to the next."""
    watch = StepWatch()
    for module in model.modules():
        if isinstance(module, Float8Experts):
            module.weight_caches = {name: ExpertCache(watch=watch) for name in ORDER}
            watch_module(module)
    refresh_before_forward(model)


def experts_of(model: nn.Module) -> dict[str, tuple[MoE, Experts]]:
    """Name -> (layer, its experts) of each mixture of experts of a model."""
    found: dict[str, tuple[MoE, Experts]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, MoE):
            found[f"{fqn}.experts" if fqn else "experts"] = (module, module.experts)
    return found


def local_shape(name: str, weight: Tensor, ranks: int) -> tuple[int, ...]:
    """The shape of a weight of experts of which each rank has some hidden features; how many experts it has is not
    known here."""
    experts, n, k = weight.shape
    return (experts, n, k // ranks) if name == "w2" else (experts, n // ranks, k)
