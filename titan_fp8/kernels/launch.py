"""Launching a Triton kernel from eager code at a small cost on the CPU.

Triton decides at each launch which of its compiled variants fits: it inspects every argument, builds a key, checks
globals. In eager mode, where a layer launches a dozen kernels of 30 microseconds, the CPU then takes longer than the
GPU. `fast(kernel)[grid](...)` is `kernel[grid](...)` with the decision made once: it keeps the compiled variant for
each combination of what variants depend on, which is for a tensor its dtype and whether its memory is aligned to 16
bytes; for an integer whether it is 1, divisible by 16, or needs 64 bits; and the compile-time constants.

`cdiv` and `next_power_of_2` are those of Triton without its wrappers for compile-time use.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.knobs
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs its kernels in the interpreter, on CPU tensors (TRITON_INTERPRET=1 when this was imported)."""

_INT32_MAX = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, for n >= 1."""
    return 1 << (n - 1).bit_length()


class _Launcher:
    """See the module's docstring. Arguments that are no compile-time constants are passed by position, a tensor first;
    constants and `num_warps` by name."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._constants = () if INTERPRETED else tuple(p.name for p in kernel.params if p.is_constexpr)
        self._specializes = () if INTERPRETED else tuple(not p.do_not_specialize for p in kernel.params)
        self._variants: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        if INTERPRETED:
            return self._kernel[grid]
        return functools.partial(self._launch, grid[0])

    def _launch(self, programs: int, *args: Any, **constants: Any) -> None:
        device = args[0].get_device()
        if device != _current_device():
            with torch.cuda.device(device):
                return self._launch(programs, *args, **constants)
        key: list[Any] = [device, *constants.values()]
        for value, specializes in zip(args, self._specializes, strict=False):
            if isinstance(value, Tensor):
                key += value.dtype, value.data_ptr() % 16
            elif not specializes:
                key.append(value > _INT32_MAX)
            else:
                key.append(1 if value == 1 else (value % 16 == 0, value > _INT32_MAX))
        variant = self._variants.get(variant_key := tuple(key))
        if variant is None:
            compiled = self._kernel[(programs,)](*args, **constants)
            self._variants[variant_key] = compiled, tuple(constants[name] for name in self._constants)
            return None
        compiled, values = variant
        compiled[(programs, 1, 1)](*args, *values, stream=_current_stream(device))
        return None


def _current_device() -> int:
    return torch._C._cuda_getDevice()  # torch.cuda.current_device() checks at each call that CUDA is initialized


def _current_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def fast(kernel: Any) -> _Launcher:
    """`fast(kernel)[(programs,)](*arguments, **constants)` launches `kernel` on the device of its first argument, which
    is a tensor, and on the current stream there."""
    launcher = getattr(kernel, "_titan_fp8_launcher", None)
    if launcher is None:  # kept on the kernel, whose hash is that of its source
        launcher = kernel._titan_fp8_launcher = _Launcher(kernel)
    return launcher


class _Zeros:
    """Zeroed int32 numbers, filled a thousand at a time: a launch for each would take longer than what they are for."""

    COUNT, STEP = 1024, 4  # 16 bytes apart, as far as fresh memory is aligned

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._left: list[Tensor] = []

    def take(self) -> Tensor:
        """A zero, shape [], that nobody else has or will get."""
        if not self._left:
            with torch.inference_mode(False):  # or nobody could save one for backward later
                zeros = torch.zeros(self.COUNT, dtype=torch.int32, device=self._device)
            self._left = list(zeros[:: self.STEP].unbind())
        return self._left.pop()


@functools.cache
def _zeros_of(device: torch.device, stream: int) -> _Zeros:
    return _Zeros(device)


def zero(device: torch.device) -> Tensor:
    """A zeroed int32 number, shape [], for a kernel on the current stream to accumulate into."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A replayed graph has to zero it each time.
        return torch.zeros((), dtype=torch.int32, device=device)
    return _zeros_of(device, _current_stream(device.index)).take()
