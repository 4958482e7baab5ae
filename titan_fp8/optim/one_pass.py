"""Adam and AdamW whose update touches memory once: gradient clipping is part of it.

`torch.optim`'s fused update reads and writes weights and moments in one pass, but clipping before it takes another over
all gradients, and AMP's way of scaling inside of it writes them back. Here the clip factor is an input of the update
(`kernels/adam`), which leaves gradients as they are. And a weight that will be cast to float8 with one scale is told
the largest value that it now has, so that the cast need not read it once more. The running means may have a dtype of
their own: they are computed in fp32, the weight's update uses them, and then they are rounded. All else is
`torch.optim`'s: parameter groups, state by the same names, hooks, and `found_inf`, a tensor by which the device skips a
step.

    optimizer = OnePassAdamW(model.parameters(), lr=3e-4)
    optimizer.clip = (max_norm / (norm + 1e-6)).clamp(max=1)        # of this step alone
    optimizer.step()
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW

from titan_fp8.kernels import adam
from titan_fp8.kernels.adam import Constants
from titan_fp8.optim.config import LARGEST_BETA_IN_BF16
from titan_fp8.quantization.shardable import ShardableWeight, local_weight

MEANS = ("exp_avg", "exp_avg_sq")
"""What the state calls the running means of the gradient and of its square."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLOT = 4  # 16 bytes: Triton compiles a kernel anew for a pointer of another alignment


class _OnePass(Adam):
    """See the module.

    Attributes:
        state_dtype: fp32 or bf16, of the running means; None: that of their parameter.
        clip: fp32 `[]`, what the gradients of the next step are multiplied by, or None.
        found_inf: fp32 `[]`, not zero where the next step is to be skipped; may be missing.
    """

    state_dtype: torch.dtype | None = None
    clip: Tensor | None = None
    decoupled: bool
    reports_writes = True  # to weights in float8, which then need not take every step for one

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim`.

        Raises:
            ValueError: an option, dtype or layout that the update has no rule for.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        if self.state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype = {self.state_dtype}: running means are kept in torch.float32 or torch.bfloat16, or with "
                "None in the dtype of their parameter"
            )
        self._check_betas(group)
        given = [option for option in ("amsgrad", "maximize", "capturable", "differentiable") if group[option]]
        if given:
            raise ValueError(f"{', '.join(given)}: the update in one pass has no such option; use torch.optim's")
        for parameter in group["params"]:
            if parameter.dtype not in _DTYPES:
                raise ValueError(f"a parameter is {parameter.dtype}; the update in one pass computes in float32")
            if not parameter.is_contiguous():
                raise ValueError(
                    f"a parameter {list(parameter.shape)} has strides {parameter.stride()}; the update in one pass "
                    "takes contiguous ones"
                )

    def _check_betas(self, group: dict[str, Any]) -> None:
        if self.state_dtype == torch.bfloat16 and max(group["betas"]) > LARGEST_BETA_IN_BF16:
            raise ValueError(
                f"betas {tuple(group['betas'])}: running means in bfloat16 do not follow the gradients with more than "
                f"{LARGEST_BETA_IN_BF16}; lower them, or keep the means in float32"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return {**super().__getstate__(), "state_dtype": self.state_dtype}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group)
        self.clip = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `torch.optim`, but that the running means get the dtype they have here, whatever they were saved in.

        Raises:
            ValueError: also for betas that the update has no rule for; nothing has been loaded then.
        """
        for group in state_dict["param_groups"]:
            self._check_betas(group)
        if self.state_dtype is None:
            super().load_state_dict(state_dict)
            return
        # torch gives all state the dtype of the parameters, and would round or copy the means on the way: they are
        # taken out after all other hooks have seen them, and put in before others do.
        means: list[dict[str, Tensor]] = []
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, found: _without_means(found, means)),
            self.register_load_state_dict_post_hook(lambda _: self._put_in(means), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _put_in(self, means: list[dict[str, Tensor]]) -> None:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for parameter, own in zip(parameters, means, strict=True):
            for name, value in own.items():
                self.state[parameter][name] = value.to(parameter.device, self.state_dtype)

    def _update_group(self, group: dict[str, Any]) -> None:
        self._check_betas(group)
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        create_missing_state(self, group, parameters)
        states = [self.state[parameter] for parameter in parameters]
        device = _plain(parameters[0]).device
        for state in states:  # loaded from an implementation that counts on the host
            state["step"] = state["step"].to(device, torch.float32)
        steps = [state["step"] for state in states]
        skip: Tensor | None = getattr(self, "found_inf", None)
        skip = None if skip is None else skip.to(device)
        # Not one tensor for all, whose value PyTorch would wait for.
        increments = [torch.ones((), device=device) if skip is None else 1 - skip] * len(steps)
        torch._foreach_add_(steps, increments)  # pyright: ignore[reportPrivateImportUsage]
        beta1, beta2 = group["betas"]
        constants = Constants(beta1, beta2, group["eps"], group["weight_decay"], self.decoupled)
        factors = adam.step_factors(steps, group["lr"], constants)
        amaxes = _slots(parameters, device)
        for parameter, state, row, amax in zip(parameters, states, factors.unbind(), amaxes, strict=True):
            float8 = _quantized_weight(parameter)
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            weight, grad, mean, square = [_plain(tensor) for tensor in tensors]
            adam.update(weight, grad.contiguous(), mean, square, row, constants, clip=self.clip, skip=skip, amax=amax)
            if float8 is not None:
                float8.written(amax)


class OnePassAdam(_OnePass):
    """`torch.optim.Adam` in one pass."""

    decoupled = False

    def __init__(self, params: Any, *, state_dtype: torch.dtype | None = None, **options: Any) -> None:
        self.state_dtype = state_dtype
        super().__init__(params, **options, foreach=False, fused=True)
        self._step_supports_amp_scaling = False  # a scaler is to divide the gradients before


class OnePassAdamW(_OnePass, AdamW):
    """`torch.optim.AdamW` in one pass."""

    decoupled = True

    def __init__(self, params: Any, *, state_dtype: torch.dtype | None = None, **options: Any) -> None:
        self.state_dtype = state_dtype
        AdamW.__init__(self, params, **options, foreach=False, fused=True)
        self._step_supports_amp_scaling = False


def takes_one_pass(parameter: Tensor) -> bool:
    """Whether a parameter is one on a GPU that the kernel updates."""
    return parameter.is_cuda and parameter.dtype in _DTYPES and parameter.is_contiguous()


def _without_means(state_dict: dict[str, Any], means: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A state to load, without what is added to `means`: the running means of each parameter, in its order."""
    states = state_dict["state"]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    means += [{name: states[key][name] for name in MEANS if name in states.get(key, ())} for key in keys]
    others = {key: {k: v for k, v in state.items() if k not in MEANS} for key, state in states.items()}
    return {**state_dict, "state": others}


def create_missing_state(optimizer: Adam, group: dict[str, Any], parameters: list[Any]) -> None:
    """Give those of `parameters`, all of `group`, that have no state yet the one that Adam's first step would give."""
    on_device = group["fused"] or group["capturable"]
    dtype: torch.dtype | None = getattr(optimizer, "state_dtype", None)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if state or not parameter.requires_grad:
            continue
        device = parameter.device if on_device else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in MEANS:
            state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def _plain(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, as the tensor that a kernel may write to."""
    local = local_weight(tensor)
    return local.tensor if isinstance(local, ShardableWeight) else local


def _quantized_weight(parameter: Any) -> ShardableWeight | None:
    local = local_weight(parameter)
    return local if isinstance(local, ShardableWeight) else None


def _slots(parameters: list[Any], device: torch.device) -> list[Tensor | None]:
    """For each parameter a zeroed int32 for its largest value, if that is wanted."""
    wanted = [_wants_amax(parameter) for parameter in parameters]
    if not any(wanted):
        return [None] * len(wanted)
    slots = iter(torch.zeros(sum(wanted), _SLOT, dtype=torch.int32, device=device)[:, 0].unbind())
    return [next(slots) if is_wanted else None for is_wanted in wanted]


def _wants_amax(parameter: Any) -> bool:
    """Whether a cast wants the largest value, and finds it on its device: not if FSDP moves the weight first."""
    weight = _quantized_weight(parameter)
    if weight is None or not weight.state.takes_amax:
        return False
    return not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == weight.device.type
