"""`[quantize.*]`: the settings of the converters. A converter runs when `model.converters` names its section.

[model]
converters = ["quantize.linear.float8"]

[quantize.linear.float8]
recipe_name = "rowwise"
filter_fqns = ["output"]
"""

from collections.abc import Iterator
from typing import Literal, get_args

from titan_fp8.config.section import Problem, Section, key
from titan_fp8.converters.filters import AUTO_FILTER, malformed, parse_recipe_table

RecipeName = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]
RECIPE_NAMES: tuple[str, ...] = get_args(RecipeName)
"""The recipes of `titan_fp8.quantization.recipes`, whose module imports torch."""

BLOCKWISE = "blockwise"

CONVERTERS = (
    "quantize.linear.float8",
    "quantize.linear.mx",
    "quantize.grouped_mm.float8",
    "quantize.grouped_mm.mx",
)
"""All converter names, which are also the paths of their sections."""


class Float8LinearSection(Section):
    """`nn.Linear` with 8-bit floating-point matrix products."""

    recipe_name: RecipeName | None = None
    """How tensors are scaled: one scale a tensor (`tensorwise`), one a row or column (`rowwise`), as `rowwise` with the
    weight's gradient in bfloat16 (`rowwise_with_gw_hp`), or one for 128 values, of weights for 128 x 128
    (`blockwise`). Unset means `tensorwise`."""

    filter_fqns: list[str] = key([])
    """Modules to leave alone. A filter matches where its components stand as one run in the module's name (`output`,
    `attention.wk`, `layers.1` and all below it), with `*` for any name. `auto_filter_small_kn` leaves alone
    the linears that are too small to gain. A filter comes before `recipe_by_fqn`."""

    recipe_by_fqn: list[str] = key([])
    """Recipes of single modules: `"pattern=recipe"` each, with patterns as in `filter_fqns`. The first entry that
    matches a linear counts; linears that none matches get `recipe_name`."""

    keep_first_blocks_hp: int = key(0, ge=0, unit="blocks")
    """Leave that many of the model's first blocks in high precision."""

    keep_last_blocks_hp: int = key(0, ge=0, unit="blocks")
    """Leave that many of the model's last blocks in high precision."""

    emulate: bool | Literal["auto"] = False
    """Compute the same 8-bit codes and multiply them in float32, on any device. `"auto"` emulates exactly the recipes
    that the device has no tensor cores for; false is an error there."""

    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What casts: the Triton kernels, or the plain PyTorch reference, which computes the same bits. `"auto"` takes
    Triton for a CUDA device where it is installed, and the reference elsewhere; the other two are errors where they
    would not be what runs."""

    round_scales_to_power_of_2: bool = False
    """Round the scales of `blockwise` to powers of two. The rowwise recipes have such scales always, `tensorwise`
    never."""

    fast_accum_in_backward: bool = False
    """Accumulate the two gradient products in the tensor core's fast, less exact mode. The forward product always
    does. `blockwise` has one mode alone."""

    grad_weight_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which the weight's gradient leaves its matrix product. `"float32"` needs `training.dtype = "float32"`."""

    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers the weights as FP8 codes. Needs two or more shard ranks."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute all weights' scales after the optimizer step, with one reduction for each mesh. Needs
    `enable_fsdp_float8_all_gather`."""

    keep_fp8_weight_shards: bool = True
    """Keep the FP8 codes of a rank's shards from one optimizer step to the next. False keeps the scales alone, from
    which every gather makes the codes again: one byte less for each parameter of the shard, and a pass over the shard
    each gather. Needs `enable_fsdp_float8_all_gather`."""

    force_recompute_fp8_weight_in_bwd: bool = False
    """Keep no FP8 copy of a whole weight from the forward to the backward pass for that pass alone: on one GPU, the
    layout that backward reads is made from the cached codes again. FSDP frees what it gathered after the forward pass
    in any case, and gathers it again; `parallelism.fsdp_reshard_after_forward = "never"` would keep it."""

    keep_gate_up_in_float8: bool = False
    """Keep the outputs of w1 and w3, the largest tensors that a block keeps for its backward pass, as e4m3 codes with a
    scale a token: half the bytes, for gradients that are computed from rounded values. Needs feed-forwards whose w1,
    w2 and w3 all have one fully float8 recipe."""

    def problems(self) -> Iterator[Problem]:
        """What would do nothing, and names that no model has."""
        for key_name, problem in emulation_problems(self.fast_accum_in_backward, self.emulate):
            yield Problem(key_name, problem)
        if self.precompute_float8_dynamic_scale_for_fsdp and not self.enable_fsdp_float8_all_gather:
            yield Problem("precompute_float8_dynamic_scale_for_fsdp", "needs enable_fsdp_float8_all_gather")
        for key_name, problem in shard_problems(self.keep_fp8_weight_shards, self.enable_fsdp_float8_all_gather):
            yield Problem(key_name, problem)
        for problem in malformed(pattern for pattern in self.filter_fqns if pattern != AUTO_FILTER):
            yield Problem("filter_fqns", problem)
        table, problems = parse_recipe_table(self.recipe_by_fqn, RECIPE_NAMES)
        for problem in problems:
            yield Problem("recipe_by_fqn", problem)
        names = {self.recipe_name or "tensorwise", *(recipe for _, recipe in table)}
        for key_name, problem in recipe_option_problems(
            names, self.round_scales_to_power_of_2, self.fast_accum_in_backward
        ):
            yield Problem(key_name, problem)


def recipe_option_problems(names: set[str], round_scales: bool, fast_accum: bool) -> Iterator[tuple[str, str]]:
    """(setting, problem) of each setting that none of the recipes called `names` has a use for."""
    if round_scales and BLOCKWISE not in names:
        yield (
            "round_scales_to_power_of_2",
            f"is for blockwise, and no linear has it ({', '.join(sorted(names))}): rowwise scales are powers of two "
            "always, tensorwise scales never; leave it out",
        )
    if fast_accum and names == {BLOCKWISE}:
        yield (
            "fast_accum_in_backward",
            "has no effect with blockwise, which adds each block's product in float32; leave it out",
        )


def shard_problems(keeps: bool, gathers: bool) -> Iterator[tuple[str, str]]:
    """(setting, problem) where codes of shards are not to be kept that nobody makes."""
    if not keeps and not gathers:
        yield (
            "keep_fp8_weight_shards",
            "false has no effect without enable_fsdp_float8_all_gather, which makes these codes; leave it out",
        )


def emulation_problems(fast_accum: bool, emulate: object) -> Iterator[tuple[str, str]]:
    """(setting, problem) of each setting that has no effect on products that are emulated everywhere."""
    if fast_accum and emulate is True:
        yield "fast_accum_in_backward", "has no effect with emulate = true, which accumulates in float32; leave it out"


class MXLinearSection(Section):
    """`nn.Linear` with MXFP8 matrix products (blocks of 32 values with a power-of-two scale each)."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_emulated"] = "mxfp8_cublas"
    """Rounding of the scales, down as the OCP specification suggests (`mxfp8_cublas`), or up so that no value
    saturates (`mxfp8_cublas_rceil`); or emulation on every device (`mxfp8_emulated`)."""

    scaling_mode: Literal["floor", "ceil", "even", "rceil"] | None = None
    """Rounding of the scales of `mxfp8_emulated`. Unset means `floor`."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """What casts along the second dimension, of tokens or of a weight's rows: the Triton kernel, which casts along both
    from one read; a CUDA kernel, built by nvcc when it is first used; or plain PyTorch. All give the same bits. On a
    CPU the default is plain PyTorch."""

    filter_fqns: list[str] = key(["output"])
    """Modules to leave alone, as in `quantize.linear.float8`."""

    emulate: bool | Literal["auto"] = False
    """Multiply what the codes stand for in ordinary matrix products, on any device. `"auto"` emulates where the device
    has no products of blocks; false is an error there, but for `mxfp8_emulated`."""

    grad_weight_in_high_precision: bool = False
    """Multiply unquantized activations and gradients for the weights' gradients."""

    enable_fsdp_mxfp8_all_gather: bool = False
    """FSDP gathers the weights as MXFP8 codes, quantized shard by shard once an optimizer step. Needs two or more shard
    ranks, and in each shard whole blocks of 32 rows."""

    def problems(self) -> Iterator[Problem]:
        """Names that no model has, and scales that a recipe cannot have."""
        for problem in malformed(self.filter_fqns):
            yield Problem("filter_fqns", problem)
        if AUTO_FILTER in self.filter_fqns:
            yield Problem("filter_fqns", f"{AUTO_FILTER!r} is a rule of quantize.linear.float8; name the linears")
        if self.scaling_mode is not None and self.recipe_name != "mxfp8_emulated":
            yield Problem(
                "scaling_mode", f'is for recipe_name = "mxfp8_emulated"; {self.recipe_name} has scales of its own'
            )


class Float8GroupedSection(Section):
    """Experts of a mixture-of-experts layer with float8 grouped matrix products, scaled by rows."""

    fqns: list[str] | str = key([])
    """Which experts are converted: patterns as in `quantize.linear.float8.filter_fqns`, a list or one string with
    commas. `experts` is all of them, and never the shared ones, which are linears."""

    filter_fqns: list[str] = key([])
    """Which of these to leave alone: patterns of the same kind. `auto_filter_small_kn` leaves alone the experts whose
    features and hidden features are too few to gain."""

    emulate: bool | Literal["auto"] = False
    """Compute the same 8-bit codes and multiply them in float32, on any device. `"auto"` emulates where the device has
    no such grouped product; false is an error there."""

    fast_accum_in_backward: bool = False
    """Accumulate the gradients of activations in the tensor core's fast, less exact mode. Outputs always do, gradients
    of weights never."""

    def patterns(self) -> list[str]:
        """`fqns` as a list."""
        return [part.strip() for part in self.fqns.split(",")] if isinstance(self.fqns, str) else self.fqns

    def problems(self) -> Iterator[Problem]:
        """Names that no model has."""
        for problem in malformed(self.patterns()):
            yield Problem("fqns", problem)
        for problem in malformed(pattern for pattern in self.filter_fqns if pattern != AUTO_FILTER):
            yield Problem("filter_fqns", problem)
        for key_name, problem in emulation_problems(self.fast_accum_in_backward, self.emulate):
            yield Problem(key_name, problem)


class MXGroupedSection(Section):
    """Experts of a mixture-of-experts layer with MXFP8 grouped matrix products."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Recipe of the conversion: scales are rounded up, so that no value saturates."""

    fqns: list[str] | str = key([])
    """Which experts are converted, as in `quantize.grouped_mm.float8`."""

    emulate: bool | Literal["auto"] = False
    """Multiply what the codes stand for in ordinary grouped products, on any device. `"auto"` emulates where the device
    has no products of blocks; false is an error there."""

    enable_fsdp_mxfp8_all_gather: bool = False
    """FSDP gathers the experts' weights as MXFP8 codes, as `quantize.linear.mx.enable_fsdp_mxfp8_all_gather` does for
    linears. Shards are whole experts, or of each expert whole blocks of 32 rows."""

    def patterns(self) -> list[str]:
        """`fqns` as a list."""
        return [part.strip() for part in self.fqns.split(",")] if isinstance(self.fqns, str) else self.fqns

    def problems(self) -> Iterator[Problem]:
        """Names that no model has."""
        for problem in malformed(self.patterns()):
            yield Problem("fqns", problem)


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
