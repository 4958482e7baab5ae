"""From the names in `model.converters` to converters."""

from collections.abc import Sequence

from titan_fp8.converters.config import CONVERTERS, QuantizeSection
from titan_fp8.converters.float8_grouped import Float8GroupedConverter
from titan_fp8.converters.float8_linear import Float8LinearConverter
from titan_fp8.converters.mx_grouped import MXGroupedConverter
from titan_fp8.converters.mx_linear import MXLinearConverter
from titan_fp8.converters.protocol import ONE_PROCESS, ConversionError, Converter, Placement
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.suggest import did_you_mean


def build_converters(
    names: Sequence[str],
    quantize: QuantizeSection,
    device: DeviceCapabilities,
    placement: Placement = ONE_PROCESS,
) -> list[Converter]:
    """The converters called `names`, in that order.

    Args:
        names: `model.converters`.
        quantize: their sections.
        device: the device that training runs on, which decides about emulation.
        placement: where the parameters will lie, which decides how often weights are cast; one process by default.

    Raises:
        ConversionError: for names that are unknown or given twice; all of them at once.
    """
    problems = [f"{name!r} is named twice; take one out" for name in dict.fromkeys(names) if names.count(name) > 1]
    converters: list[Converter] = []
    for name in dict.fromkeys(names):
        if name == Float8LinearConverter.name:
            converters.append(Float8LinearConverter(quantize.linear.float8, device, placement))
        elif name == Float8GroupedConverter.name:
            converters.append(Float8GroupedConverter(quantize.grouped_mm.float8, device, placement))
        elif name == MXLinearConverter.name:
            converters.append(MXLinearConverter(quantize.linear.mx, device, placement))
        elif name == MXGroupedConverter.name:
            converters.append(MXGroupedConverter(quantize.grouped_mm.mx, device, placement))
        else:
            problems.append(
                f"{name!r}: no such converter{did_you_mean(name, CONVERTERS)}; known: {', '.join(CONVERTERS)}"
            )
    if problems:
        raise ConversionError(problems)
    return converters
