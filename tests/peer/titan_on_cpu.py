"""torchtitan's trainer on CPUs: `torchrun titan_on_cpu.py launch.py OPTIONS` runs `scripts/peer/launch.py` there.

torchtitan 0.2.2 takes it for granted that there is an accelerator: its device's module is asked for what CPUs lack, and
groups are told of devices. FSDP scales while it reduces, which gloo cannot.
"""

import importlib
import runpy
import sys
import types
from typing import Any

import torch
import torch._utils
import torch.distributed
from torch.distributed.fsdp import FSDPModule


def main() -> None:
    options = sys.argv[1:]
    # torchtitan.config reads the command line when it is imported.
    sys.argv[1:] = options[options.index("--") + 1 :]
    stand_in_for_a_device()
    sys.argv = options
    runpy.run_path(options[0], run_name="__main__")


def stand_in_for_a_device() -> None:
    """Give torchtitan a CPU for its accelerator; its packages are imported after this."""
    device = types.SimpleNamespace(
        set_device=lambda device: None,
        current_device=lambda: 0,
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=2**35),
        memory_stats=lambda device=None: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        synchronize=lambda: None,
    )
    replaced: dict[tuple[Any, str], Any] = {
        (torch._utils, "_get_available_device_type"): lambda: "cpu",
        (torch._utils, "_get_device_module"): lambda kind: device,
    }
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    importlib.import_module("torchtitan.tools.utils").get_peak_flops = lambda name: 1e12
    barrier, scale = torch.distributed.barrier, FSDPModule.set_gradient_divide_factor
    setattr(torch.distributed, "barrier", lambda *args, **more: barrier())  # noqa: B010

    def scale_apart(self: FSDPModule, factor: float) -> None:
        scale(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = scale_apart
    count_integers()


def count_integers() -> None:
    """`torch.histc` of integers, by which the peer counts tokens of an expert."""
    of_floats = torch.histc
    torch.histc = lambda x, **more: of_floats(x.float(), **more).to(x.dtype)


if __name__ == "__main__":
    main()
