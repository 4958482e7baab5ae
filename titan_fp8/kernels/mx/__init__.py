"""MXFP8: e4m3 codes with one power-of-two scale for 32 values (OCP Microscaling Formats, v1.0).

`reference.py` says what is computed, `layout.py` how scales lie in memory; `kernel.py` (Triton) computes it on a GPU in
one read, `columns.cu` (CUDA C++, built when it is first used) the transposed layout alone. All give the same bits. The
functions here check their input and take the Triton kernel for CUDA tensors where Triton is installed, otherwise the
reference.

    to_mx, from_mx             the format, along any dimension of any tensor
    cast_rows, _columns, _both operands of products: along K, along T and transposed, or both from one read
    cast_experts               both, of weights [E, N, K]; cast_expert_rows, _columns: one of them
    cast_group_...             rows sorted into groups, one an expert
    quantize_dequantize...     what such operands stand for, in bf16, for tensor cores without block scales

T tokens (rows), M rows in groups, N rows of an expert's weight, K features (columns), E experts or groups. `padded(T)`
is T rounded up to a multiple of 32. K is a multiple of 32, and N, M and the size of each group are too. Inputs are
bf16, fp16 or fp32; codes are float8_e4m3fn and scales float8_e8m0fnu. `mode` is one of `MODES` (see `reference.py`).
`swizzled` scales are in the layout that Blackwell's tensor cores read (see `layout.py` for shapes), others are plain.
Plain scales of transposed codes are `[K, T/32]` with K contiguous in memory: they lie as x does, whose lines kernels
write, and which is how scales of a weight are gathered.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.mx import columns_cuda, layout, reference
from titan_fp8.kernels.mx.layout import (
    swizzle,
    swizzle_column_groups,
    swizzle_row_groups,
    unswizzle,
    unswizzle_column_groups,
    unswizzle_row_groups,
)
from titan_fp8.kernels.mx.reference import BLOCK, E8M0, MODES, padded
from titan_fp8.runtime.operators import register_operator

__all__ = [
    "BLOCK",
    "DIM1_KERNELS",
    "E8M0",
    "MODES",
    "cast_both",
    "cast_columns",
    "cast_expert_columns",
    "cast_expert_rows",
    "cast_experts",
    "cast_group_both",
    "cast_group_columns",
    "cast_group_rows",
    "cast_rows",
    "from_mx",
    "padded",
    "quantize_dequantize",
    "quantize_dequantize_groups",
    "swizzle",
    "swizzle_column_groups",
    "swizzle_row_groups",
    "to_mx",
    "unswizzle",
    "unswizzle_column_groups",
    "unswizzle_row_groups",
]

DIM1_KERNELS = ("triton", "cuda", "torch")
"""Choices of `mxfp8_dim1_cast_kernel_choice`; see `cast_columns`."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def to_mx(t: Tensor, block_size: int = BLOCK, scaling_mode: str = "rceil", *, dim: int = -1) -> tuple[Tensor, Tensor]:
    """A tensor in MXFP8 (OCP Microscaling Formats v1.0, section 6.3).

    Args:
        t: bf16, fp16 or fp32, of any shape; its size along `dim` is a multiple of 32.
        block_size: values that share a scale, 32.
        scaling_mode: "floor", "ceil", "even" or "rceil": how the exponent of a scale follows from a block's amax.
        dim: the dimension along which blocks lie.

    Returns:
        `(scale, data)`: float8_e8m0fnu of t's shape divided by 32 along `dim`, and float8_e4m3fn of t's shape, with
        `t ~= data * scale`. What lies along `dim` is contiguous in memory. A block that holds NaN or Inf has scale NaN.

    Raises:
        ValueError: for another dtype, size, block size, mode or dim.
    """
    if block_size != BLOCK:
        raise ValueError(f"block_size={block_size}: blocks of MXFP8 hold {BLOCK} values; leave it at {BLOCK}")
    _check_mode(scaling_mode)
    if not -t.dim() <= dim < t.dim():
        raise ValueError(f"dim={dim} is not one of the {t.dim()} dimensions of a tensor of shape {list(t.shape)}")
    _check_values(t, dim, f"a size along dim {dim}")
    return (to_mx_op if torch.compiler.is_compiling() else _to_mx)(t, scaling_mode, dim)


def _to_mx(t: Tensor, scaling_mode: str, dim: int) -> tuple[Tensor, Tensor]:
    last = t.movedim(dim, -1)
    if t.dim() == 2 and dim in (0, -2) and float8.uses_kernel(t) and t.shape[1] % BLOCK == 0:
        codes, scale = cast_columns(t, scaling_mode)
        scale = scale.contiguous()
    else:
        codes, scale = cast_rows(last.unsqueeze(0).flatten(0, -2), scaling_mode)
        codes, scale = codes.view(last.shape), scale.view(*last.shape[:-1], last.shape[-1] // BLOCK)
    return scale.movedim(-1, dim), codes.movedim(-1, dim)


def _like_mx(t: Tensor, scaling_mode: str, dim: int) -> tuple[Tensor, Tensor]:
    *others, size = t.movedim(dim, -1).shape
    scale, codes = (
        t.new_empty((*others, length), dtype=dtype).movedim(-1, dim)
        for length, dtype in ((size // BLOCK, E8M0), (size, float8.E4M3))
    )
    return scale, codes


to_mx_op = register_operator(
    "to_mx(Tensor t, str scaling_mode, int dim) -> (Tensor scale, Tensor data)", _to_mx, _like_mx
)
"""What compiled code calls in `to_mx`: the compiler has no arithmetic on float8_e8m0fnu."""


def from_mx(scale: Tensor, data: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that a tensor in MXFP8 stands for.

    Args:
        scale: float8_e8m0fnu, as `to_mx` returns it: of data's shape, divided by 32 along one dimension.
        data: float8_e4m3fn.
        dtype: of the result, bf16, fp16 or fp32.

    Returns:
        `data * scale` in the shape of data, the exact product rounded once. Products of 2^128 and more are Inf.

    Raises:
        ValueError: for other dtypes or shapes.
    """
    if data.dtype != float8.E4M3 or scale.dtype != E8M0 or dtype not in _DTYPES:
        raise ValueError(
            f"expected scale in {E8M0}, data in {float8.E4M3} and dtype bf16, fp16 or fp32, got {scale.dtype}, "
            f"{data.dtype} and {dtype}"
        )
    divided = [dim for dim in range(data.dim()) if scale.dim() == data.dim() and scale.shape[dim] != data.shape[dim]]
    if data.numel() == 0 and scale.numel() == 0:
        return torch.empty(data.shape, dtype=dtype, device=data.device)
    if len(divided) != 1 or scale.shape[divided[0]] * BLOCK != data.shape[divided[0]]:
        raise ValueError(
            f"scale {list(scale.shape)} and data {list(data.shape)} do not fit: their shapes are the same but for one "
            f"dimension, where data is {BLOCK} times as large; swizzled scales go through `unswizzle` first"
        )
    return (from_mx_op if torch.compiler.is_compiling() else _from_mx)(scale, data, dtype, divided[0])


def _from_mx(scale: Tensor, data: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    codes, scale = data.movedim(dim, -1), scale.movedim(dim, -1)
    return reference.values_last(codes.contiguous(), scale.contiguous(), dtype).movedim(-1, dim)


from_mx_op = register_operator(
    "from_mx(Tensor scale, Tensor data, ScalarType dtype, int dim) -> Tensor",
    _from_mx,
    lambda scale, data, dtype, dim: data.new_empty(data.movedim(dim, -1).shape, dtype=dtype).movedim(-1, dim),
)
"""What compiled code calls in `from_mx`, likewise."""


def cast_rows(x: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x32 blocks along K: `(codes [T, K], scale [T, K/32])`."""
    _check(x, mode)
    if float8.uses_kernel(x):
        kernel = _kernel()
        codes, scale = kernel.cast(x, kernel.dense(x), None, mode, rows=True, columns=False, swizzled=swizzled)
        return codes, scale
    codes, scale = reference.cast_rows(x, mode)
    return codes, swizzle(scale) if swizzled else scale


def cast_columns(x: Tensor, mode: str, *, swizzled: bool = False, kernel: str = "triton") -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 32x1 blocks along T, transposed: `(codes_t [K, padded(T)], scale_t [K, padded(T)/32])`; codes
    of the padding are zero.

    Args:
        x: see above.
        mode: see above.
        swizzled: see above.
        kernel: what computes it, `mxfp8_dim1_cast_kernel_choice`. "triton" is the Triton kernel, and on a CPU, where
            all casts are plain PyTorch, the reference; "cuda" is a CUDA kernel, which is built by nvcc when it is first
            used; "torch" is the reference. All give the same bits, and none stands in for another.

    Raises:
        ValueError: for a wrong input, and where the kernel cannot run: "cuda" on a CPU tensor or where it cannot be
            built, "triton" on a CUDA tensor without Triton.
    """
    _check(x, mode)
    if kernel not in DIM1_KERNELS:
        raise ValueError(f"kernel={kernel!r} is not one of {', '.join(map(repr, DIM1_KERNELS))}")
    if kernel == "cuda":
        return columns_cuda.cast_columns(x, mode, swizzled=swizzled)
    if kernel == "triton" and x.is_cuda and not float8.has_triton():
        raise ValueError("kernel='triton' needs Triton, which is not installed here; install it or use kernel='torch'")
    if kernel == "triton" and float8.uses_kernel(x):
        module = _kernel()
        codes, scale = module.cast(x, module.dense(x), None, mode, rows=False, columns=True, swizzled=swizzled)
        return codes, scale
    codes_t, scale_t = reference.cast_columns(x, mode)
    return codes_t, swizzle(scale_t) if swizzled else scale_t


def cast_both(x: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_rows` and `cast_columns` of one tensor, from one read: `(codes, scale, codes_t, scale_t)`."""
    _check(x, mode)
    if not float8.uses_kernel(x):
        return *cast_rows(x, mode, swizzled=swizzled), *cast_columns(x, mode, swizzled=swizzled)
    kernel = _kernel()
    return kernel.cast(x, kernel.dense(x), None, mode, rows=True, columns=True, swizzled=swizzled)


def cast_experts(weight: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both casts of each expert's weight `[N, K]`, from one read of `[E, N, K]`: `(codes [E, N, K], scale [E, N, K/32],
    codes_t [E, K, N], scale_t [E, K, N/32])`."""
    codes, scale, codes_t, scale_t = _cast_experts(weight, mode, swizzled, rows=True, columns=True)
    return codes, scale, codes_t, scale_t


def cast_expert_rows(weight: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """The first two of `cast_experts`."""
    codes, scale = _cast_experts(weight, mode, swizzled, rows=True, columns=False)
    return codes, scale


def cast_expert_columns(weight: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """The last two of `cast_experts`."""
    codes_t, scale_t = _cast_experts(weight, mode, swizzled, rows=False, columns=True)
    return codes_t, scale_t


def _cast_experts(weight: Tensor, mode: str, swizzled: bool, *, rows: bool, columns: bool) -> tuple[Tensor, ...]:
    if weight.dim() != 3 or any(size % BLOCK for size in weight.shape[1:]):
        raise ValueError(f"expected weights [E, N, K], N and K multiples of {BLOCK}, got shape {list(weight.shape)}")
    _check_mode(mode)
    _check_values(weight, -1, "features")
    if not float8.uses_kernel(weight):
        codes, scale, codes_t, scale_t = reference.cast_experts(weight, mode)
        if swizzled:
            scale, scale_t = swizzle(scale), swizzle(scale_t)
        return *((codes, scale) if rows else ()), *((codes_t, scale_t) if columns else ())
    kernel, (experts, out_features, features) = _kernel(), weight.shape
    flat, of = weight.reshape(-1, features), kernel.Rows(kernel.EXPERTS, out_features)
    found = kernel.cast(flat, of, None, mode, rows=rows, columns=columns, swizzled=swizzled)
    if not rows:
        return found
    codes, scale, *by_columns = found
    scale = scale if swizzled else scale.view(experts, out_features, features // BLOCK)
    return codes.view(weight.shape), scale, *by_columns


def cast_group_rows(x: Tensor, ends: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """Cast x `[M, K]` whose rows are groups along K: `(codes [M, K], scale [M, K/32])`. `ends` int32 `[E]` is the row
    behind each group, ascending, multiples of 32. Behind the last group codes are zero and scale bytes too."""
    _check_groups(x, ends, mode)
    if float8.uses_kernel(x):
        codes, scale = _cast_groups(x, ends, mode, rows=True, columns=False, swizzled=swizzled)
        return codes, scale
    codes, scale = reference.cast_rows(reference.without_tail(x, ends), mode)
    return codes, swizzle_row_groups(scale, ends) if swizzled else scale


def cast_group_columns(x: Tensor, ends: Tensor, mode: str, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """Cast x `[M, K]` whose rows are groups along M, transposed: `(codes_t [K, M], scale_t [K, M/32])`. No block is of
    two groups. `ends` and what is behind the last group: as in `cast_group_rows`."""
    _check_groups(x, ends, mode)
    if float8.uses_kernel(x):
        codes_t, scale_t = _cast_groups(x, ends, mode, rows=False, columns=True, swizzled=swizzled)
        return codes_t, scale_t
    codes_t, scale_t = reference.cast_columns(reference.without_tail(x, ends), mode)
    return codes_t, swizzle_column_groups(scale_t, ends) if swizzled else scale_t


def cast_group_both(
    x: Tensor, ends: Tensor, mode: str, *, swizzled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_group_rows` and `cast_group_columns` of one tensor, from one read: `(codes, scale, codes_t, scale_t)`."""
    _check_groups(x, ends, mode)
    if float8.uses_kernel(x):
        codes, scale, codes_t, scale_t = _cast_groups(x, ends, mode, rows=True, columns=True, swizzled=swizzled)
        return codes, scale, codes_t, scale_t
    by_rows = cast_group_rows(x, ends, mode, swizzled=swizzled)
    return *by_rows, *cast_group_columns(x, ends, mode, swizzled=swizzled)


def quantize_dequantize(
    x: Tensor, mode: str, *, rows: bool = True, columns: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """What x `[T, K]` is once it is cast, from one read: `(by 1x32 blocks along K, by 32x1 blocks along T)`, each bf16
    `[T, K]`, or None if not asked for.

    A product of such numbers in bf16 is one of the codes with their scales: they are exact for exponents from -124
    to 119, and below rounded to nearest.
    """
    _check(x, mode)
    return _quantize_dequantize(x, None, mode, rows, columns)


def quantize_dequantize_groups(
    x: Tensor, ends: Tensor, mode: str, *, rows: bool = True, columns: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """`quantize_dequantize` of x `[M, K]` whose rows are groups, with `ends` as in `cast_group_rows`. Behind the last
    group both are zero."""
    _check_groups(x, ends, mode)
    return _quantize_dequantize(x, ends, mode, rows, columns)


def _quantize_dequantize(
    x: Tensor, ends: Tensor | None, mode: str, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not rows and not columns:
        return None, None
    if float8.uses_kernel(x):
        kernel = _kernel()
        of = kernel.dense(x) if ends is None else kernel.Rows(kernel.GROUPS, x.shape[0], ends.shape[0])
        ends = None if ends is None else ends.contiguous()
        found = kernel.quantize_dequantize(x, of, ends, mode, rows=rows, columns=columns)
        return found[0] if rows else None, found[-1] if columns else None
    by_rows, by_columns = reference.quantize_dequantize(x if ends is None else reference.without_tail(x, ends), mode)
    return by_rows if rows else None, by_columns if columns else None


def _cast_groups(
    x: Tensor, ends: Tensor, mode: str, *, rows: bool, columns: bool, swizzled: bool
) -> tuple[Tensor, ...]:
    kernel = _kernel()
    of = kernel.Rows(kernel.GROUPS, x.shape[0], ends.shape[0])
    return kernel.cast(x, of, ends.contiguous(), mode, rows=rows, columns=columns, swizzled=swizzled)


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.mx.kernel")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"scaling mode {mode!r} is not one of {', '.join(map(repr, MODES))}")


def _check_values(x: Tensor, dim: int, what: str) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"expected a bf16, fp16 or fp32 tensor, got {x.dtype}; convert it first")
    if x.shape[dim] % BLOCK:
        raise ValueError(
            f"{what} of {x.shape[dim]} is not a multiple of {BLOCK}, as blocks of MXFP8 are (shape {list(x.shape)}); "
            "pad it with zeros, or leave the tensor in high precision"
        )


def _check(x: Tensor, mode: str) -> None:
    _check_mode(mode)
    if x.dim() != 2:
        raise ValueError(f"expected a 2-D tensor [T, K], got shape {list(x.shape)}; flatten its leading dimensions")
    _check_values(x, -1, "features")


def _check_groups(x: Tensor, ends: Tensor, mode: str) -> None:
    _check(x, mode)
    if x.shape[0] % BLOCK or ends.dim() != 1 or ends.dtype != torch.int32 or not len(ends):
        raise ValueError(
            f"expected rows in a multiple of {BLOCK} and the int32 ends of their groups, got {list(x.shape)} and "
            f"{ends.dtype} {list(ends.shape)}; pad each group to a multiple of {BLOCK}"
        )


assert layout.TILE_ROWS == layout.TILE_COLUMNS * BLOCK, "a tile of scales belongs to a square of values"
