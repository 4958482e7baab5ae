"""Launching a Triton kernel from eager code at a small cost on the CPU.

Triton decides at each launch which of its compiled variants fits: it inspects every argument, builds a key, checks
globals. In eager mode, where a layer launches a dozen kernels of 30 microseconds, the CPU then takes longer than the
GPU. Here the decision is made once, and the compiled variant is run without Triton's Python in between. There are two
ways, of which the second costs a third of the first:

    fast(kernel)[grid](...)   as `kernel[grid](...)`. It keeps the variant for each combination of what variants depend
                              on, which is for a tensor its dtype and whether its memory is aligned to 16 bytes; for an
                              integer whether it is 1, divisible by 16, or needs 64 bits; and the constants
    @planned(kernel)          turns a function that works out a whole launch but for the pointers into one that
                              launches, and works it out once for each set of the function's arguments

A hook that a profiler of Triton has set for launches is not called.

`cdiv` and `next_power_of_2` are those of Triton without its wrappers for compile-time use.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.knobs
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs its kernels in the interpreter, on CPU tensors (TRITON_INTERPRET=1 when this was imported)."""

MAX_PLANS = 4096
"""How many launches of a kernel are kept: where every batch has another number of tokens, there is no end of them."""
MAX_ZEROS = 2**19
"""int32 numbers that are zeroed together, for vectors of one size: 2 MiB, or one vector if that is larger."""
_INT32_MAX = 2**31 - 1
_ALIGNMENT = 16
_DEFAULT_STREAM = 0

# Without the checks of torch.cuda that CUDA is initialized. A build of torch without CUDA has neither.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, for n >= 1."""
    return 1 << (n - 1).bit_length()


class _Variant(NamedTuple):
    """A compiled kernel for one device: what runs it, and the values of its compile-time parameters."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class _Variants:
    """The compiled variants of a kernel. Arguments that are no compile-time constants are passed by position, a tensor
    first; constants and `num_warps` by name."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._constants = () if INTERPRETED else tuple(p.name for p in kernel.params if p.is_constexpr)
        self._specializes = () if INTERPRETED else tuple(not p.do_not_specialize for p in kernel.params)
        self._variants: dict[Any, _Variant] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        if INTERPRETED:
            return self._kernel[grid]
        return functools.partial(self._launch, grid[0])

    def _launch(self, programs: int, *args: Any, **constants: Any) -> _Variant:
        device = args[0].get_device()
        if device != _current_device():
            with torch.cuda.device(device):
                return self._launch(programs, *args, **constants)
        key: list[Any] = [device, *constants.values()]
        values: list[Any] = []
        for value, specializes in zip(args, self._specializes, strict=False):
            if isinstance(value, Tensor):
                values.append(pointer := value.data_ptr())
                key += value.dtype, pointer % _ALIGNMENT == 0
                continue
            values.append(value)
            if not specializes:
                key.append(value > _INT32_MAX)
            else:
                key.append(1 if value == 1 else (value % 16 == 0, value > _INT32_MAX))
        variant = self._variants.get(variant_key := tuple(key))
        if variant is None:
            compiled = self._kernel[(programs,)](*args, **constants)
            in_order = tuple(constants[name] for name in self._constants)
            variant = _Variant(compiled.run, compiled.function, compiled.packed_metadata, in_order)
            self._variants[variant_key] = variant
        else:
            run, function, metadata, in_order = variant
            stream = _current_stream(device)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *in_order)
        return variant


def fast(kernel: Any) -> _Variants:
    """`fast(kernel)[(programs,)](*arguments, **constants)` launches `kernel` on the device of its first argument, which
    is a tensor, and on the current stream there."""
    variants = getattr(kernel, "_titan_fp8_variants", None)
    if variants is None:  # kept on the kernel, whose hash is that of its source
        variants = kernel._titan_fp8_variants = _Variants(kernel)
    return variants


class Plan(NamedTuple):
    """A launch but for its pointers.

    Attributes:
        programs: how many.
        integers: the kernel's parameters between the pointers and the compile-time constants.
        constants: compile-time constants and options like `num_warps`, by name.
    """

    programs: int
    integers: tuple[int, ...]
    constants: dict[str, Any]


class _Planned:
    """See `planned`."""

    def __init__(self, kernel: Any, plan: Callable[..., Plan]) -> None:
        self._kernel = kernel
        self._plan = plan
        self._ready: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], *key: Any) -> None:
        if INTERPRETED:
            return self._launch_by_plan(tensors, -1, key, None)
        device = tensors[0].get_device()
        if device != _current_device():
            with torch.cuda.device(device):
                return self(tensors, *key)
        pointers, bits = [], 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
        ready_key = device, key
        if bits % _ALIGNMENT:
            ready_key += (tuple([pointer % _ALIGNMENT == 0 for pointer in pointers]),)
        ready = self._ready.get(ready_key)
        if ready is None:
            return self._launch_by_plan(tensors, device, key, ready_key)
        run, programs, function, metadata, rest = ready
        run(programs, 1, 1, _current_stream(device), function, metadata, None, None, None, *pointers, *rest)
        return None

    def _launch_by_plan(self, tensors: tuple[Tensor, ...], device: int, key: tuple[Any, ...], ready_key: Any) -> None:
        plan = self._plan(device, *key)
        launch = fast(self._kernel)[(plan.programs,)]
        variant = launch(*map(_as_bytes, tensors), *plan.integers, **plan.constants)
        if not INTERPRETED:
            if len(self._ready) >= MAX_PLANS:
                self._ready.clear()
            rest = (*plan.integers, *variant.constants)
            self._ready[ready_key] = variant.run, plan.programs, variant.function, variant.metadata, rest


def planned(kernel: Any) -> Callable[[Callable[..., Plan]], Callable[..., None]]:
    """Decorates `plan(device, *key)`, which says how to launch `kernel` for a key: the result, `launch(tensors, *key)`,
    launches it on the device of the tensors, whose index `plan` gets, and on the current stream there.

    `tensors` are the kernel's pointers, which come first among its parameters; float8 tensors are bytes to it. The plan
    may depend on nothing but its arguments, and each of the tensors' dtypes must follow from them too: they are hashed
    to find what was planned before.
    """
    return functools.partial(_Planned, kernel)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


@functools.cache
def _zeros_left(device: int, size: int) -> list[Tensor]:
    return []


def zeros(like: Tensor, size: int = 0) -> Tensor:
    """Zeroed int32 on the device of `like`, of shape [size] or, without a size, [], for a kernel on the current stream
    to accumulate into. Nobody else has it or will get it, but many lie in one storage: keep it no longer than it is
    needed, and do not change it with an operator of torch, which would count as a change of all of them."""
    device = like.get_device()
    # What a graph captures has to be zeroed in each replay, and what Inductor runs once before it captures may not keep
    # memory, which comes from the graph's own. Neither is ever on the default stream.
    if INTERPRETED or _current_stream(device) != _DEFAULT_STREAM:
        return torch.zeros(size or (), dtype=torch.int32, device=like.device)
    left = _zeros_left(device, size)
    try:
        return left.pop()
    except IndexError:
        left += _many_zeros(like.device, size)
        return left.pop()


def _many_zeros(device: torch.device, size: int) -> list[Tensor]:
    """Filled together: a launch for each would take longer than what they are for."""
    step = cdiv(size or 1, 4) * 4  # 16 bytes apart, as far as fresh memory is aligned
    count = max(1, min(256, MAX_ZEROS // step))
    with torch.inference_mode(False):  # or nobody could save one for backward later
        filled = torch.zeros(count, step, dtype=torch.int32, device=device)
        return list((filled[:, :size] if size else filled[:, 0]).unbind())
