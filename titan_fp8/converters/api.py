"""Float8 for anybody's model in anybody's loop: one call, without the trainer and its configuration."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from titan_fp8.converters.config import emulation_problems
from titan_fp8.converters.float8_grouped import ExpertWeights, convert_grouped
from titan_fp8.converters.float8_linear import convert_linears
from titan_fp8.converters.mx_grouped import convert_mx_grouped
from titan_fp8.converters.mx_linear import convert_mx_linears, mx_request_from_arguments
from titan_fp8.converters.report import ConversionReport
from titan_fp8.converters.request import Arguments, check_model, request_from_arguments
from titan_fp8.runtime.device import detect_device


def convert_to_float8_training(
    model: nn.Module,
    *,
    recipe_name: str = "tensorwise",
    filter_fqns: Sequence[str] = (),
    recipe_by_fqn: Mapping[str, str] | Sequence[str] = (),
    keep_first_blocks_hp: int = 0,
    keep_last_blocks_hp: int = 0,
    emulate: bool | Literal["auto"] = False,
    kernels: Literal["auto", "triton", "torch"] = "auto",
    round_scales_to_power_of_2: bool = False,
    fast_accum_in_backward: bool = False,
    grad_weight_dtype: torch.dtype = torch.bfloat16,
    cache_weights: bool = False,
    enable_fsdp_float8_all_gather: bool = False,
    keep_fp8_weight_shards: bool = True,
    force_recompute_fp8_weight_in_bwd: bool = False,
    keep_gate_up_in_float8: bool = False,
) -> ConversionReport:
    """Replace the linear layers of `model` in place by `Float8Linear`s, which train in float8.

    Parameters stay the same objects in their own dtype, so an optimizer built before or after works, and so do state
    dicts; only `enable_fsdp_float8_all_gather` wraps them. Call it before wrapping the model in DDP, FSDP or
    `torch.compile`.

    Args:
        model: any module that contains linear layers; on any device, the meta device included.
        recipe_name: "tensorwise" (fastest), "rowwise" (more exact), "rowwise_with_gw_hp" (the weight's gradient in high
            precision) or "blockwise" (scales for 128 values, of weights for 128 x 128).
        filter_fqns: names of modules to leave in high precision, as runs of components: `output`, `layers.0`,
            `attention.*`; `auto_filter_small_kn` leaves those alone that are too small to gain.
        recipe_by_fqn: recipes of single modules, `{"attention.wo": "rowwise"}` or `["attention.wo=rowwise"]`; the first
            pattern that matches counts, and a filter comes before it.
        keep_first_blocks_hp, keep_last_blocks_hp: how many of the model's repeated blocks stay in high precision.
        emulate: True multiplies the same codes in fp32 on any device, "auto" does so exactly for the recipes that this
            machine's accelerator has no tensor cores for; False is an error there.
        kernels: "triton" or "torch" is an error where something else would cast; "auto" takes Triton on a GPU. Both
            compute the same bits.
        round_scales_to_power_of_2: round the scales of "blockwise" to powers of two.
        fast_accum_in_backward: use the tensor cores' fast, less exact accumulation for gradients too; an error with
            emulate=True, which has none.
        grad_weight_dtype: torch.bfloat16 or torch.float32, the type in which a weight's gradient leaves its product.
        cache_weights: keep the codes of a weight from one optimizer step to the next, instead of casting it in each
            pass. An obligation comes with it: whoever writes to a weight other than by a `torch.optim` optimizer, by
            `load_state_dict` or by an operation that autograd's version counter sees (so: through `.data`, or with a
            kernel of his own) calls `titan_fp8.mark_stale(model)` after it.
        enable_fsdp_float8_all_gather: `fully_shard` will gather the codes of the weights. Build the optimizer after
            `fully_shard`; the step may be followed by `precompute_float8_dynamic_scale_for_fsdp(model)`.
        keep_fp8_weight_shards: False, with `enable_fsdp_float8_all_gather`: where the codes of a rank's shards would be
            kept (with `cache_weights`, or from that function on), keep the scales alone, from which each gather makes
            the codes; that saves one byte a parameter of the shard, and costs a pass over the shard each gather.
        force_recompute_fp8_weight_in_bwd: save no codes of a weight for backward, which casts the parameter again (with
            `cache_weights`: makes the layout that it reads from the cached codes). Set it under FSDP that gathers in
            high precision: otherwise the codes of the whole model are kept from the forward to the backward pass.
        keep_gate_up_in_float8: the feed-forwards of a decoder of this package keep the outputs of w1 and w3 as e4m3
            codes for backward; an error in a model where none can.

    Returns:
        A report with a row for each linear layer; `print(report)` shows the table.

    Raises:
        ConversionError: (a ValueError) if anything cannot be done as asked, with all reasons; the model is then
            unchanged.
    """
    check_model(model)
    request, problems = request_from_arguments(
        recipe_name=recipe_name,
        filter_fqns=filter_fqns,
        recipe_by_fqn=recipe_by_fqn,
        keep_first_blocks_hp=keep_first_blocks_hp,
        keep_last_blocks_hp=keep_last_blocks_hp,
        emulate=emulate,
        kernels=kernels,
        round_scales_to_power_of_2=round_scales_to_power_of_2,
        fast_accum_in_backward=fast_accum_in_backward,
        grad_weight_dtype=grad_weight_dtype,
        cache_weights=cache_weights,
        enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather,
        keep_fp8_weight_shards=keep_fp8_weight_shards,
        force_recompute_fp8_weight_in_bwd=force_recompute_fp8_weight_in_bwd,
        keep_gate_up_in_float8=keep_gate_up_in_float8,
    )
    return convert_linears(model, request, detect_device(), problems=problems)


def convert_to_float8_grouped_training(
    model: nn.Module,
    *,
    fqns: Sequence[str] = ("experts",),
    filter_fqns: Sequence[str] = (),
    emulate: bool | Literal["auto"] = False,
    fast_accum_in_backward: bool = False,
    aligned_groups: bool = False,
    cache_weights: bool = False,
    enable_fsdp_float8_all_gather: bool = False,
) -> ConversionReport:
    """Let the experts of `model` multiply in float8, in place: rowwise scales, all three products, groups of 16 rows.

    Experts are those of this package, `titan_fp8.models.moe.MoE`, and all modules that hold parameters `[E, ...]` of
    three dimensions and multiply rows by them with `torch._grouped_mm` or `torch.nn.functional.grouped_mm` (rows
    `[T, K]` sorted by expert, weights `[E, K, N]`, `offs` int32 `[E]`). Of the latter nothing is replaced but `forward`
    on the instance: in it, and in nothing that was traced or bound before, these two functions compute in float8.
    A forward pass that calls neither is a `titan_fp8.runtime.errors.UserError` (a ValueError), and so is a product that
    cannot run in float8. Convert before `torch.compile`.

    Args:
        model: has experts; on any device, the meta device included.
        fqns: which experts, as runs of components of their names: `experts`, `layers.1`.
        filter_fqns: which of these to leave in high precision; `auto_filter_small_kn` leaves those of this package
            alone whose features and hidden features are too few to gain.
        emulate: True multiplies the same codes in fp32 on any device, "auto" does so where this machine's accelerator
            has no such grouped product; False is an error there.
        fast_accum_in_backward: use the tensor cores' fast, less exact accumulation for gradients of activations too;
            an error with emulate=True, which has none.
        aligned_groups: of experts that are not this package's: all `offs`, and T, are multiples of 16. Without it rows
            are moved to such groups as they are cast, and results moved back, on the device, in memory for
            `T + 15 (E + 1)` rows. `offs` on a GPU that are not as promised give wrong gradients unnoticed, since nobody
            waits for them; on the CPU they are a ValueError.
        cache_weights: keep the codes of a weight from one optimizer step to the next; the obligation that comes with it
            is that of `convert_to_float8_training`. For this package's experts alone, as is the next.
        enable_fsdp_float8_all_gather: FSDP2 gathers the weights as codes, made once an optimizer step, so that
            cache_weights beside it is an error. The parameters become new ones: build the optimizer afterwards, and
            shard with `fully_shard`.

    Returns:
        A report with a row for each weight of experts; `print(report)` shows the table.

    Raises:
        ConversionError: (a ValueError) if anything cannot be done as asked, with all reasons; the model is then
            unchanged.
    """
    check_model(model)
    checked = Arguments(
        fqns=fqns,
        filter_fqns=filter_fqns,
        fast_accum_in_backward=fast_accum_in_backward,
        aligned_groups=aligned_groups,
        cache_weights=cache_weights,
        enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather,
    )
    checked.names("fqns", or_one=True)
    checked.names("filter_fqns")
    checked.flags("fast_accum_in_backward", "aligned_groups", "cache_weights", "enable_fsdp_float8_all_gather")
    settings, problems = checked.settings, checked.problems
    caches, gathers = (settings.pop(name, False) for name in ("cache_weights", "enable_fsdp_float8_all_gather"))
    accumulation = emulation_problems(settings.get("fast_accum_in_backward", False), emulate)
    problems += [f"{name}: {problem}" for name, problem in accumulation]
    if caches and gathers:
        problems.append(
            "cache_weights = True has no effect with enable_fsdp_float8_all_gather = True, whose codes are made once "
            "an optimizer step; leave it out"
        )
    kept = ExpertWeights.CACHED if caches else ExpertWeights.CAST
    weights = ExpertWeights.GATHERED if gathers else kept
    settings.setdefault("fqns", ["experts"])
    return convert_grouped(
        model, device=detect_device(), emulate=emulate, weights=weights, problems=problems, **settings
    )


def convert_to_float8_nocompile_training(
    model: nn.Module,
    *,
    recipe_name: str = "tensorwise",
    filter_fqns: Sequence[str] = (),
    recipe_by_fqn: Mapping[str, str] | Sequence[str] = (),
    keep_first_blocks_hp: int = 0,
    keep_last_blocks_hp: int = 0,
    emulate: bool | Literal["auto"] = False,
    round_scales_to_power_of_2: bool = False,
    fast_accum_in_backward: bool = False,
    grad_weight_dtype: torch.dtype = torch.bfloat16,
    cache_weights: bool = False,
    enable_fsdp_float8_all_gather: bool = False,
    keep_fp8_weight_shards: bool = True,
    force_recompute_fp8_weight_in_bwd: bool = False,
    keep_gate_up_in_float8: bool = False,
) -> ConversionReport:
    """`convert_to_float8_training` for eager mode: on a GPU with the Triton kernels, or not at all.

    Casts are one or two passes over memory without `torch.compile`, activation checkpointing is noticed by itself, and
    everything is the same bit for bit as in `convert_to_float8_training`, whose arguments these are. Without a GPU,
    which needs `emulate`, the plain reference computes the same numbers.

    Raises:
        ConversionError: also if there is a GPU and no Triton.
    """
    on_gpu = detect_device().kind == "cuda"
    return convert_to_float8_training(
        model,
        recipe_name=recipe_name,
        filter_fqns=filter_fqns,
        recipe_by_fqn=recipe_by_fqn,
        keep_first_blocks_hp=keep_first_blocks_hp,
        keep_last_blocks_hp=keep_last_blocks_hp,
        emulate=emulate,
        kernels="triton" if on_gpu else "auto",
        round_scales_to_power_of_2=round_scales_to_power_of_2,
        fast_accum_in_backward=fast_accum_in_backward,
        grad_weight_dtype=grad_weight_dtype,
        cache_weights=cache_weights,
        enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather,
        keep_fp8_weight_shards=keep_fp8_weight_shards,
        force_recompute_fp8_weight_in_bwd=force_recompute_fp8_weight_in_bwd,
        keep_gate_up_in_float8=keep_gate_up_in_float8,
    )


def convert_to_mxfp8_training(
    model: nn.Module,
    *,
    recipe_name: str = "mxfp8_cublas",
    filter_fqns: Sequence[str] = (),
    emulate: bool | Literal["auto"] = False,
    scaling_mode: str | None = None,
    mxfp8_dim1_cast_kernel_choice: str | None = None,
    grad_weight_in_high_precision: bool = False,
    cache_weights: bool = False,
    enable_fsdp_mxfp8_all_gather: bool = False,
) -> ConversionReport:
    """Replace the linears of `model` by `MXFP8Linear`s, in place: products of e4m3 codes with a scale for 32 values.

    Args:
        model: any model, on any device; K and N of its linears are multiples of 32. Its parameters stay the same
            objects, but for `enable_fsdp_mxfp8_all_gather`. Call it before wrapping the model in DDP, FSDP or
            `torch.compile`.
        recipe_name: "mxfp8_cublas" (scales rounded down), "mxfp8_cublas_rceil" (up), or "mxfp8_emulated".
        filter_fqns: linears to leave alone, as runs of components of their names.
        emulate: True multiplies what the codes stand for on any device, "auto" does so where this machine's accelerator
            has no products of blocks (compute capability 10.x has); False is an error there.
        scaling_mode: of "mxfp8_emulated": "floor" (None), "ceil", "even" or "rceil".
        mxfp8_dim1_cast_kernel_choice: "triton", "cuda" or "torch": what casts along tokens, and along a weight's rows.
            None: "triton" on a GPU, and "torch" elsewhere.
        grad_weight_in_high_precision: multiply unquantized tensors for the weights' gradients.
        cache_weights: keep the codes of a weight from one optimizer step to the next, 2.06 bytes a parameter (emulated
            4, on a CPU 8), instead of casting it in each pass. The obligation that comes with it is that of
            `convert_to_float8_training`.
        enable_fsdp_mxfp8_all_gather: `fully_shard` will gather the codes of the weights; the shards must be whole
            blocks of 32 rows. The parameters become new ones: build the optimizer after `fully_shard`. With
            `cache_weights` shards are cast once an optimizer step, otherwise for each gather; a step may be followed by
            `precompute_float8_dynamic_scale_for_fsdp(model)`, which casts them then.

    Returns:
        A report with a row for each linear; `print(report)` shows the table.

    Raises:
        ConversionError: (a ValueError) if anything cannot be done as asked, with all reasons; the model is then
            unchanged.
    """
    check_model(model)
    request, problems = mx_request_from_arguments(
        recipe_name=recipe_name,
        scaling_mode=scaling_mode,
        filter_fqns=filter_fqns,
        emulate=emulate,
        mxfp8_dim1_cast_kernel_choice=mxfp8_dim1_cast_kernel_choice,
        grad_weight_in_high_precision=grad_weight_in_high_precision,
        cache_weights=cache_weights,
        enable_fsdp_mxfp8_all_gather=enable_fsdp_mxfp8_all_gather,
    )
    return convert_mx_linears(model, request, detect_device(), problems=problems)


def convert_to_mxfp8_grouped_training(
    model: nn.Module,
    *,
    fqns: Sequence[str] = ("experts",),
    emulate: bool | Literal["auto"] = False,
    aligned_groups: bool = False,
    cache_weights: bool = False,
    enable_fsdp_mxfp8_all_gather: bool = False,
) -> ConversionReport:
    """Let the experts of `model` multiply in MXFP8, in place: all three products, groups of 32 rows.

    Experts are the same as for `convert_to_float8_grouped_training`: those of this package, and modules whose forward
    pass calls PyTorch's grouped product; K and N are multiples of 32.

    Args:
        model: has experts; on any device, the meta device included. Its parameters stay the same objects.
        fqns: which experts, as runs of components of their names: `experts`, `layers.1`.
        emulate: True multiplies what the codes stand for on any device, "auto" does so where this machine's accelerator
            has no products of blocks; False is an error there.
        aligned_groups: as for `convert_to_float8_grouped_training`, with 32 in the place of 16.
        cache_weights, enable_fsdp_mxfp8_all_gather: as for `convert_to_mxfp8_training`, of this package's experts
            alone. Shards are whole experts, or of each expert whole blocks of 32 rows.

    Returns:
        A report with a row for each weight of experts; `print(report)` shows the table.

    Raises:
        ConversionError: (a ValueError) if anything cannot be done as asked, with all reasons; the model is then
            unchanged.
    """
    check_model(model)
    checked = Arguments(
        fqns=fqns,
        aligned_groups=aligned_groups,
        cache_weights=cache_weights,
        enable_fsdp_mxfp8_all_gather=enable_fsdp_mxfp8_all_gather,
    )
    checked.names("fqns", or_one=True)
    checked.flags("aligned_groups", "cache_weights", "enable_fsdp_mxfp8_all_gather")
    settings = checked.settings
    settings.setdefault("fqns", ["experts"])
    gathers = settings.pop("enable_fsdp_mxfp8_all_gather", False)
    return convert_mx_grouped(
        model,
        device=detect_device(),
        emulate=emulate,
        gathers_codes=gathers,
        problems=checked.problems,
        **settings,
    )
