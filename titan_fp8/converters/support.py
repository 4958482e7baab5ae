"""Where a recipe runs on the tensor cores: the table of devices in `docs/float8.md`, as code.

tensorwise and the two rowwise recipes need FP8 tensor cores, which NVIDIA has from compute capability 8.9 on. The
blockwise product is one of cuBLAS, for compute capability 9.0 alone, since CUDA 12.9. On anything else the same codes
are multiplied in fp32, if emulation is asked for; nothing is emulated unasked.

What PyTorch must be is the same for all: a release that this package takes (2.11 or later), built for a CUDA that knows
the device: 12.8 or later for compute capability 10.0 and 12.0.
"""

from collections.abc import Iterable

from titan_fp8.kernels.float8 import has_triton
from titan_fp8.kernels.mx import DIM1_KERNELS
from titan_fp8.kernels.mx.columns_cuda import cuda_kernel_problem
from titan_fp8.quantization.mx_grouped_ops import missing_grouped_product
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE, MX_RECIPES, MXRecipe
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

BLOCKWISE_CAPABILITY = (9, 0)
BLOCKWISE_CUDA = (12, 9)
GROUPED_CAPABILITY = (9, 0)
MX_MAJOR, MX_CUDA = 10, (12, 8)


def why_not_native(recipe: Float8Recipe, device: DeviceCapabilities) -> str | None:
    """Why the products of `recipe` cannot run on the tensor cores of `device`, or None if they can."""
    if not device.has_fp8_tensor_cores:
        return f"{device.name} has no FP8 tensor cores"
    if recipe.granularity is not Granularity.BLOCK:
        return None
    if device.compute_capability != BLOCKWISE_CAPABILITY:
        return f"{device.name} has no blockwise product, which cuBLAS has for compute capability 9.0 (Hopper) alone"
    if device.cuda_version is None or device.cuda_version < BLOCKWISE_CUDA:
        built = ".".join(map(str, device.cuda_version)) if device.cuda_version else "unknown"
        return f"the blockwise product needs CUDA 12.9 or later, and PyTorch is built for CUDA {built}"
    return None


def resolve_emulation(
    emulate: object, recipes: Iterable[Float8Recipe], device: DeviceCapabilities, *, setting: str
) -> dict[Float8Recipe, tuple[bool, str]]:
    """For each recipe: whether to emulate it on `device`, and the words for it in a report.

    Args:
        emulate: True, False, or "auto": exactly what the device lacks.
        recipes: the recipes in use.
        device: what training runs on.
        setting: name of the setting, for the message.

    Raises:
        UserError: if `emulate` is false and the device lacks a recipe, with a line for each reason; or if it is neither
            a bool nor "auto".
    """
    if not isinstance(emulate, bool) and emulate != "auto":
        raise UserError(f'{setting} = {emulate!r}: expected true, false or "auto"')
    lacking = {recipe: why_not_native(recipe, device) for recipe in recipes}
    if emulate is True:
        return dict.fromkeys(lacking, (True, "emulated"))
    if emulate == "auto":
        return {
            recipe: (False, "native") if reason is None else (True, f"emulated: {reason}")
            for recipe, reason in lacking.items()
        }
    lines = []
    for reason in dict.fromkeys(reason for reason in lacking.values() if reason is not None):
        names = ", ".join(recipe.name for recipe, its_reason in lacking.items() if its_reason == reason)
        lines.append(
            f"{setting} = false, but {reason} (recipe {names}); "
            f'set {setting} to true (emulate) or "auto" (emulate where needed)'
        )
    if lines:
        raise UserError("\n".join(lines))
    return dict.fromkeys(lacking, (False, "native"))


def resolve_grouped_emulation(emulate: object, device: DeviceCapabilities, *, setting: str) -> tuple[bool, str]:
    """Whether to emulate the grouped products of experts on `device`, and the words for it in a report.

    Raises:
        UserError: if `emulate` is false and the device has no such product; or if it is neither a bool nor "auto".
    """
    if not isinstance(emulate, bool) and emulate != "auto":
        raise UserError(f'{setting} = {emulate!r}: expected true, false or "auto"')
    if emulate is True:
        return True, "emulated"
    reason = None
    if not device.has_fp8_tensor_cores:
        reason = f"{device.name} has no FP8 tensor cores"
    elif device.compute_capability != GROUPED_CAPABILITY:
        reason = (
            f"{device.name} has no grouped product with scales by rows, which PyTorch has for compute capability 9.0 "
            "(Hopper) alone"
        )
    if reason is None:
        return False, "native"
    if emulate == "auto":
        return True, f"emulated: {reason}"
    raise UserError(
        f'{setting} = false, but {reason}; set {setting} to true (emulate) or "auto" (emulate where needed)'
    )


def _why_no_blocks(recipe: MXRecipe, device: DeviceCapabilities) -> str | None:
    """Why the products of `recipe` cannot run on the tensor cores of `device`, or None if they can."""
    capability = device.compute_capability
    if capability is None or capability[0] != MX_MAJOR:
        of_it = "" if capability is None else f" of compute capability {capability[0]}.{capability[1]}"
        return f"{device.name}{of_it} has no products of MX blocks, which compute capability 10.x (Blackwell) has"
    if device.cuda_version is None or device.cuda_version < MX_CUDA:
        built = ".".join(map(str, device.cuda_version)) if device.cuda_version else "unknown"
        return f"products of MX blocks need CUDA 12.8 or later, and PyTorch is built for CUDA {built}"
    if recipe is GROUPED_RECIPE and (missing := missing_grouped_product()):
        return f"PyTorch as it is built here has no grouped products of MX blocks ({missing})"
    return None


def resolve_mx_emulation(
    emulate: object, recipe: MXRecipe, device: DeviceCapabilities, *, setting: str
) -> tuple[bool, str]:
    """Whether to emulate the products of `recipe` on `device`, and the words for it in a report.

    Raises:
        UserError: if `emulate` is false and the device has no products of blocks; or if it is neither a bool nor
            "auto".
    """
    if not isinstance(emulate, bool) and emulate != "auto":
        raise UserError(f'{setting} = {emulate!r}: expected true, false or "auto"')
    if emulate is True or recipe.is_emulated:
        return True, "emulated"
    reason = _why_no_blocks(recipe, device)
    if reason is None:
        return False, "native"
    if emulate == "auto":
        return True, f"emulated: {reason}"
    or_else = ', or take recipe_name = "mxfp8_emulated"' if recipe.name in MX_RECIPES else ""
    raise UserError(
        f'{setting} = false, but {reason}; set {setting} to true (emulate) or "auto" (emulate where needed){or_else}'
    )


def resolve_dim1_kernel(choice: object, device: DeviceCapabilities, *, is_default: bool, setting: str) -> str:
    """What casts MX operands on `device`, for a report. is_default: nobody asked for `choice`.

    Raises:
        UserError: if `choice` is no kernel, or cannot run on the device and was asked for.
    """
    if choice not in DIM1_KERNELS:
        raise UserError(f"{setting} = {choice!r}: expected one of {', '.join(DIM1_KERNELS)}")
    on_gpu = device.kind == "cuda"
    if choice == "torch":
        return "torch"
    if not on_gpu:
        if is_default:
            return "torch"
        raise UserError(
            f'{setting} = "{choice}", but {device.name} is no CUDA device; leave it out, or set it to "torch", the '
            "plain reference"
        )
    if choice == "cuda" and (problem := cuda_kernel_problem()):
        raise UserError(f'{setting} = "cuda": {problem}')
    if choice == "triton" and not has_triton():
        raise UserError(f'{setting} = "triton", but Triton is not installed (pip install triton); or set it to "torch"')
    return str(choice)


def resolve_kernels(kernels: object, device: DeviceCapabilities, *, setting: str) -> str:
    """What casts tensors on `device`: "triton" or "torch". Both compute the same bits.

    Raises:
        UserError: if it is not what was asked for, or if `kernels` is none of "auto", "triton" and "torch".
    """
    if kernels not in ("auto", "triton", "torch"):
        raise UserError(f'{setting} = {kernels!r}: expected "auto", "triton" or "torch"')
    on_gpu, installed = device.kind == "cuda", has_triton()
    there = "triton" if on_gpu and installed else "torch"
    if kernels in ("auto", there):
        return there
    if kernels == "triton":
        missing = "Triton is not installed (pip install triton)" if on_gpu else f"{device.name} is no CUDA device"
        raise UserError(
            f'{setting} = "triton", but {missing}; set {setting} = "auto", which takes the plain reference here'
        )
    raise UserError(
        f'{setting} = "torch", but casts on {device.name} run the Triton kernels, which give the same bits; '
        f'leave {setting} at "auto", or train where Triton is not installed'
    )
