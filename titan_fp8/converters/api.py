"""Float8 for anybody's model in anybody's loop: one call, without the trainer and its configuration."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from titan_fp8.converters.float8_linear import Float8Request, convert_linears
from titan_fp8.converters.report import ConversionReport
from titan_fp8.runtime.device import detect_device
from titan_fp8.runtime.errors import UserError


def convert_to_float8_training(
    model: nn.Module,
    *,
    recipe_name: str = "tensorwise",
    filter_fqns: Sequence[str] = (),
    emulate: bool | Literal["auto"] = False,
    fast_accum_in_backward: bool = False,
    grad_weight_dtype: torch.dtype = torch.bfloat16,
) -> ConversionReport:
    """Replace the linear layers of `model` in place by `Float8Linear`s, which train in float8.

    Parameters stay the same objects in their own dtype, so an optimizer built before or after works, and so do state
    dicts. Call it before wrapping the model in DDP, FSDP or `torch.compile`.

    Args:
        model: any module that contains linear layers; on any device, the meta device included.
        recipe_name: "tensorwise" (fastest) or "rowwise" (more exact).
        filter_fqns: names of modules to leave in high precision, as runs of components: `output`, `layers.0`,
            `attention.*`; `auto_filter_small_kn` leaves those alone that are too small to gain.
        emulate: True multiplies the same codes in fp32 on any device, "auto" does so exactly where this machine's
            accelerator has no FP8 tensor cores; False is an error there.
        fast_accum_in_backward: use the tensor cores' fast, less exact accumulation for gradients too.
        grad_weight_dtype: torch.bfloat16 or torch.float32, the type in which a weight's gradient leaves its product.

    Returns:
        A report with a row for each linear layer; `print(report)` shows the table.

    Raises:
        ConversionError: (a ValueError) if anything cannot be done as asked, with all reasons; the model is then
            unchanged.
    """
    is_list = isinstance(filter_fqns, Sequence) and not isinstance(filter_fqns, str)
    if not is_list or not all(isinstance(pattern, str) for pattern in filter_fqns):
        raise UserError(f"filter_fqns = {filter_fqns!r}: expected a list of names")
    if not isinstance(fast_accum_in_backward, bool):
        raise UserError(f"fast_accum_in_backward = {fast_accum_in_backward!r}: expected True or False")
    if grad_weight_dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"grad_weight_dtype = {grad_weight_dtype}: expected torch.bfloat16 or torch.float32")
    request = Float8Request(
        recipe_name=recipe_name,
        filter_fqns=tuple(filter_fqns),
        emulate=emulate,
        fast_accum_in_backward=fast_accum_in_backward,
        grad_weight_dtype=grad_weight_dtype,
    )
    return convert_linears(model, request, detect_device())
