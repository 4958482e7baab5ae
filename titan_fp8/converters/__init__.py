"""Converters rewrite a model before it is sharded: each replaces the modules it is for and reports what it did.

`build_converters(names, quantize, device)` makes those that `model.converters` names; see `protocol.py` for what one
is, `filters.py` for how modules are left alone and `float8_linear.py` for the one to read first.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.converters.protocol import ConversionError, Converter
    from titan_fp8.converters.registry import build_converters
    from titan_fp8.converters.report import ConversionReport

__all__ = ["ConversionError", "ConversionReport", "Converter", "build_converters"]

_HOME = {
    "ConversionError": "protocol",
    "ConversionReport": "report",
    "Converter": "protocol",
    "build_converters": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
