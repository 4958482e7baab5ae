"""Builds and calls `columns.cu`, the transposed cast in CUDA C++.

`torch.utils.cpp_extension` builds the file with nvcc when it is first used and keeps the library (in
TORCH_EXTENSIONS_DIR), for the GPUs at hand or those of TORCH_CUDA_ARCH_LIST. The library has one function, which takes
pointers, so that nothing of PyTorch's headers is compiled.
"""

import ctypes
import functools
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.mx.layout import padded_shape
from titan_fp8.kernels.mx.reference import BLOCK, CARRY, E8M0, padded
from titan_fp8.runtime.errors import UserError

SOURCE = Path(__file__).with_name("columns.cu")
FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_WORD_BYTES = 4
_POINTERS, _SIZES, _NUMBERS = 3, 3, 3
_OTHERS = 'choose "triton" or "torch" (mxfp8_dim1_cast_kernel_choice)'


def cast_columns(x: Tensor, mode: str, *, swizzled: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.mx.cast_columns`.

    Raises:
        UserError: for a CPU tensor, and where the kernel cannot be built.
    """
    if not x.is_cuda:
        raise UserError(f"the cuda kernel casts CUDA tensors, and this one is on {x.device}; {_OTHERS}")
    function, (tokens, features) = _function(), x.shape
    x = x if _has_whole_words(x) else x.contiguous()
    codes_t = torch.empty(features, padded(tokens), dtype=E4M3, device=x.device)
    scale_t = _new_scale(features, padded(tokens) // BLOCK, swizzled, x.device)
    if x.numel() == 0:
        return codes_t, scale_t
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        pointers = x.data_ptr(), codes_t.data_ptr(), scale_t.data_ptr()
        error = function(*pointers, tokens, features, x.stride(0), FORMATS[x.dtype], CARRY[mode], swizzled, stream)
    if error:
        raise RuntimeError(f"the cuda kernel of the cast of {list(x.shape)} could not start: CUDA error {error}")
    return codes_t, scale_t


def _has_whole_words(x: Tensor) -> bool:
    """Whether each row's numbers are contiguous, from a multiple of 4 bytes on."""
    is_aligned = x.data_ptr() % _WORD_BYTES == 0 and x.stride(0) * x.element_size() % _WORD_BYTES == 0
    return x.stride(1) == 1 and is_aligned


def _new_scale(rows: int, columns: int, swizzled: bool, device: torch.device) -> Tensor:
    if not swizzled:
        return torch.empty(columns, rows, dtype=torch.uint8, device=device).view(E8M0).t()
    shape = padded_shape(rows, columns)
    make = torch.empty if shape == (rows, columns) else torch.zeros  # the kernel writes no padding
    return make(shape, dtype=torch.uint8, device=device).view(E8M0)


@functools.cache
def _function() -> Callable[..., int]:
    """The function of the library, built if it is not yet."""
    function = ctypes.CDLL(build()).titan_fp8_mx_cast_columns
    integers = [ctypes.c_int64] * _SIZES + [ctypes.c_int] * _NUMBERS
    function.argtypes = [ctypes.c_void_p] * _POINTERS + integers + [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def build() -> str:
    """Build the library unless it is there, and return its path.

    Raises:
        UserError: if a tool for it is missing or fails; the message says how to build it.
    """
    problem = cuda_kernel_problem()
    if problem is not None:
        raise UserError(problem)
    tools = importlib.import_module("torch.utils.cpp_extension")
    try:
        return tools.load(
            "titan_fp8_mx_columns", [str(SOURCE)], extra_cuda_cflags=["-O3"], with_cuda=True, is_python_module=False
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"the cuda kernel could not be built; {_OTHERS}, or mend the build: {error}") from error


def cuda_kernel_problem() -> str | None:
    """What is missing to build the library, and how to get it; None: nothing."""
    missing = _missing_tools(importlib.import_module("torch.utils.cpp_extension").CUDA_HOME)
    if not missing:
        return None
    return (
        f"the cuda kernel is built when it is first used; missing here: {', '.join(missing)}. Install the CUDA "
        f"toolkit of PyTorch's version (CUDA {torch.version.cuda}) with CUDA_HOME naming its folder, a C++ "
        f"compiler and ninja (`pip install ninja`); or {_OTHERS}"
    )


def _missing_tools(cuda_home: str | None) -> list[str]:
    """What is needed to build and is not found, by name."""
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    found = {
        "nvcc (CUDA_HOME)": bool(cuda_home) and nvcc.is_file(),
        "a CUDA build of PyTorch": torch.version.cuda is not None,
        "ninja": shutil.which("ninja") is not None,
        "a C++ compiler (c++)": shutil.which("c++") is not None,
    }
    return [name for name, is_there in found.items() if not is_there]
