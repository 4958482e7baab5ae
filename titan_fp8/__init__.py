"""titan_fp8: LLM pre-training in 8-bit floating point.

`./run_train.sh` trains from a TOML file. In a training loop of your own:

    import titan_fp8
    report = titan_fp8.convert_to_float8_training(model, recipe_name="rowwise", filter_fqns=["output"])

Importing this package loads nothing heavy; its names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.converters.api import (
        convert_to_float8_grouped_training,
        convert_to_float8_nocompile_training,
        convert_to_float8_training,
    )
    from titan_fp8.converters.protocol import ConversionError
    from titan_fp8.converters.report import ConversionReport
    from titan_fp8.kernels.mx import from_mx, to_mx
    from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp
    from titan_fp8.quantization.linear import Float8Linear
    from titan_fp8.quantization.weights import mark_stale

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "ConversionReport",
    "Float8Linear",
    "__version__",
    "convert_to_float8_grouped_training",
    "convert_to_float8_nocompile_training",
    "convert_to_float8_training",
    "from_mx",
    "mark_stale",
    "precompute_float8_dynamic_scale_for_fsdp",
    "to_mx",
]

_HOME = {
    "ConversionError": "titan_fp8.converters.protocol",
    "ConversionReport": "titan_fp8.converters.report",
    "Float8Linear": "titan_fp8.quantization.linear",
    "convert_to_float8_grouped_training": "titan_fp8.converters.api",
    "convert_to_float8_nocompile_training": "titan_fp8.converters.api",
    "convert_to_float8_training": "titan_fp8.converters.api",
    "from_mx": "titan_fp8.kernels.mx",
    "mark_stale": "titan_fp8.quantization.weights",
    "precompute_float8_dynamic_scale_for_fsdp": "titan_fp8.quantization.fsdp_weight",
    "to_mx": "titan_fp8.kernels.mx",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
