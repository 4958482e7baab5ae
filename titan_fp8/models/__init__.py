"""The models: one decoder, with families and flavors as tables of dimensions.

Plain single-device modules that know neither quantization nor parallelism: converters and parallelism are applied to
them from outside. Names are loaded on first use, so that `import titan_fp8.models.flavors` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.models.arithmetic import count_parameters, flops_per_token
    from titan_fp8.models.decoder import Decoder
    from titan_fp8.models.dims import ModelDims
    from titan_fp8.models.families import FLAVORS
    from titan_fp8.models.flavors import resolve_dims
    from titan_fp8.models.initialization import initialize
    from titan_fp8.models.linear import Linear
    from titan_fp8.models.loss import cross_entropy_sum

_HOMES = {
    "FLAVORS": "families",
    "Decoder": "decoder",
    "Linear": "linear",
    "ModelDims": "dims",
    "count_parameters": "arithmetic",
    "cross_entropy_sum": "loss",
    "flops_per_token": "arithmetic",
    "initialize": "initialization",
    "resolve_dims": "flavors",
}

__all__ = [
    "FLAVORS",
    "Decoder",
    "Linear",
    "ModelDims",
    "count_parameters",
    "cross_entropy_sum",
    "flops_per_token",
    "initialize",
    "resolve_dims",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
