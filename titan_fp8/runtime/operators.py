"""Registration of the custom operators `torch.ops.titan_fp8.*`, which the compiler does not look into.

The low-level `torch.library.Library` is used, whose calls cost a quarter of `custom_op`'s.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("titan_fp8", "DEF")


def register_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """A new operator for CPU and CUDA tensors, without a derivative.

    Args:
        schema: PyTorch's, without the namespace: `scale(Tensor x, float by) -> Tensor`.
        implementation: what it computes.
        fake: shapes, dtypes and strides of its result, for the compiler.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    # Without this each call would pass through autograd's "not implemented" kernel first.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"titan_fp8::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.titan_fp8, name).default
