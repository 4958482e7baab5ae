"""Where activations are computed again, routers choose no other experts than before."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.models.decoder import Decoder
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.compile import apply_compile
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection

Build = Callable[..., Decoder]
LAYERS = 3
EXPERTS = {"n_experts": 4, "top_k": 2, "n_shared_experts": 1, "moe_ffn_dim": 32, "first_dense_layers": 1}
NOTING = "note_operations_for_a_test"
COMPILED = CompileSection(enable=True, backend=NOTING)
TOPK, MM = torch.ops.aten.topk.default, torch.ops.aten.mm.default
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def ops_of_backward(register_backend: Callable[..., None]) -> list[object]:
    """The operations in backward graphs compiled by the backend called NOTING."""
    ops: list[object] = []

    def forward_compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        return make_boxed_func(graph.forward)

    def backward_compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        ops.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    register_backend(NOTING, aot_autograd(fw_compiler=forward_compiler, bw_compiler=backward_compiler))
    return ops


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def _model(build: Build, compile_config: CompileSection, parts: bool = False, **keys: str) -> Decoder:
    """A dense block and two with experts; `parts`: compiled as expert parallelism has them."""
    model = build(LAYERS, None, **EXPERTS)
    section = ActivationCheckpointSection(**keys)  # pyright: ignore[reportArgumentType]
    apply_activation_checkpointing(model, section, compile_config=compile_config, around_experts=parts)
    apply_compile(model, compile_config, around_experts=parts)
    return model


def _loss(model: Decoder) -> Tensor:
    return model(torch.arange(32).view(2, 16)).sum()


@pytest.mark.parametrize("compile_config", [CompileSection(), COMPILED], ids=["eager", "parts compiled"])
@pytest.mark.parametrize("keys", [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "1"}])
def test_a_router_that_has_turned_round_sends_tokens_where_it_did_at_first(
    keys: dict[str, str], compile_config: CompileSection, tiny_decoder: Build, ops_of_backward: list[object]
) -> None:
    model = _model(tiny_decoder, compile_config, parts=compile_config.enable, **keys)
    passes: dict[int, list[Tensor]] = {}
    moes = [block.moe for block in model.layers.values() if block.moe is not None]
    for number, moe in enumerate(moes):
        dispatch = moe.dispatcher.dispatch

        def watched(x: Tensor, experts: Tensor, *rest, number: int = number, dispatch=dispatch):
            passes.setdefault(number, []).append(experts)
            return dispatch(x, experts, *rest)

        moe.dispatcher.dispatch = watched
    loss = _loss(model)
    with torch.no_grad():
        for moe in moes:
            moe.router.gate.weight.neg_()
    loss.backward()
    assert len(passes) == LAYERS - 1
    for moe, (first, again) in zip(moes, passes.values(), strict=True):
        assert torch.equal(first, again)
        counts = torch.bincount(first.flatten(), minlength=EXPERTS["n_experts"])
        assert torch.equal(moe.tokens_per_expert, counts.float())


@pytest.mark.parametrize("keys", [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}])
def test_a_compiled_block_keeps_what_its_router_chose(
    keys: dict[str, str], tiny_decoder: Build, ops_of_backward: list[object]
) -> None:
    _loss(_model(tiny_decoder, COMPILED, **keys)).backward()
    assert MM in ops_of_backward
    assert TOPK not in ops_of_backward


def test_by_operation_what_a_router_chose_is_kept(tiny_decoder: Build) -> None:
    loss = _loss(_model(tiny_decoder, CompileSection(), mode="selective", selective_ac_option="op"))
    with _Noting() as backward:
        loss.backward()
    assert MM in backward.ops
    assert TOPK not in backward.ops
