"""`[quantize.*]`: the settings of the converters. A converter runs when `model.converters` names its section.

[model]
converters = ["quantize.linear.float8"]

[quantize.linear.float8]
recipe_name = "rowwise"
filter_fqns = ["output"]
"""

from collections.abc import Iterator
from typing import Literal

from titan_fp8.config.section import Problem, Section, key, not_supported_yet

CONVERTERS = (
    "quantize.linear.float8",
    "quantize.linear.mx",
    "quantize.grouped_mm.float8",
    "quantize.grouped_mm.mx",
)
"""All converter names, which are also the paths of their sections."""

UNSUPPORTED_CONVERTERS = ("quantize.linear.mx", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx")
"""Converters whose feature does not exist yet."""


class Float8LinearSection(Section):
    """`nn.Linear` with 8-bit floating-point matrix products."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = key(
        None, unsupported_values=("rowwise_with_gw_hp",)
    )
    """How tensors are scaled: one scale a tensor (`tensorwise`), one a row or column (`rowwise`), or as `rowwise` with
    the weight's gradient in bfloat16 (`rowwise_with_gw_hp`). Unset means `tensorwise`."""

    filter_fqns: list[str] = key([])
    """Modules to leave alone. A filter matches where its components stand as one run in the module's name (`output`,
    `attention.wk`, `layers.1` and all below it), with `*` for any name. `auto_filter_small_kn` leaves alone
    the linears that are too small to gain."""

    emulate: bool | Literal["auto"] = False
    """Compute the same 8-bit codes and multiply them in float32, on any device. `"auto"` emulates exactly where the
    device has no FP8 tensor cores; false is an error there."""

    fast_accum_in_backward: bool = False
    """Accumulate the two gradient products in the tensor core's fast, less exact mode. The forward product always
    does."""

    grad_weight_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which the weight's gradient leaves its matrix product."""

    enable_fsdp_float8_all_gather: bool = not_supported_yet(False)
    """FSDP gathers the weights as FP8 codes. Needs two or more shard ranks."""

    precompute_float8_dynamic_scale_for_fsdp: bool = not_supported_yet(False)
    """Compute all weights' scales after the optimizer step with one reduction. Needs
    `enable_fsdp_float8_all_gather`."""

    force_recompute_fp8_weight_in_bwd: bool = not_supported_yet(False)
    """Free the gathered FP8 weight after the forward pass and rebuild it for the backward pass. Needs
    `enable_fsdp_float8_all_gather`."""

    def problems(self) -> Iterator[Problem]:
        """What would do nothing."""
        if self.fast_accum_in_backward and self.emulate is True:
            yield Problem("fast_accum_in_backward", "has no effect with emulate = true, which accumulates in float32")
        for name in ("precompute_float8_dynamic_scale_for_fsdp", "force_recompute_fp8_weight_in_bwd"):
            if getattr(self, name) and not self.enable_fsdp_float8_all_gather:
                yield Problem(name, "needs enable_fsdp_float8_all_gather")


class MXLinearSection(Section):
    """`nn.Linear` with MXFP8 matrix products (blocks of 32 values with a power-of-two scale each)."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_emulated"] = not_supported_yet("mxfp8_cublas")
    """Rounding of the scales (`mxfp8_cublas` down, `mxfp8_cublas_rceil` up), or emulation."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = not_supported_yet("triton")
    """Kernel of the cast along the second dimension."""

    filter_fqns: list[str] = not_supported_yet(["output"])
    """Modules to leave alone, as in `quantize.linear.float8`."""

    emulate: bool | Literal["auto"] = not_supported_yet(False)
    """Compute the same codes and multiply them in higher precision, as in `quantize.linear.float8`."""


class Float8GroupedSection(Section):
    """Experts of a mixture-of-experts layer with float8 grouped matrix products."""

    fqns: list[str] | str = not_supported_yet([])
    """Modules whose experts are converted."""


class MXGroupedSection(Section):
    """Experts of a mixture-of-experts layer with MXFP8 grouped matrix products."""

    recipe_name: Literal["mxfp8"] = not_supported_yet("mxfp8")
    """Recipe of the conversion."""

    fqns: list[str] | str = not_supported_yet([])
    """Modules whose experts are converted."""


class QuantizeLinearSection(Section):
    """Converters of `nn.Linear`."""

    float8: Float8LinearSection = Float8LinearSection()
    """Float8 matrix products."""

    mx: MXLinearSection = MXLinearSection()
    """MXFP8 matrix products."""


class QuantizeGroupedMMSection(Section):
    """Converters of the experts' grouped matrix products."""

    float8: Float8GroupedSection = Float8GroupedSection()
    """Float8 grouped matrix products."""

    mx: MXGroupedSection = MXGroupedSection()
    """MXFP8 grouped matrix products."""


class QuantizeSection(Section):
    """Settings of the quantizing converters."""

    linear: QuantizeLinearSection = QuantizeLinearSection()
    """Converters of `nn.Linear`."""

    grouped_mm: QuantizeGroupedMMSection = QuantizeGroupedMMSection()
    """Converters of the experts' grouped matrix products."""
