"""Per-block compilation: one compilation for all blocks, unchanged names, clear refusals."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from torch import Tensor

from tests.cases import some_by_hand
from titan_fp8.models import rope
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.compile import apply_compile, compile_loss
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.runtime.errors import UserError

Build = Callable[..., Decoder]
BACKEND = "count_graphs_for_a_test"

# What Dynamo does to trace is not ours: it looks at `.grad` of a block's input, instantiates autograd.Function
# and, on its way to Inductor, imports scripted functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning"),
]


@pytest.fixture
def graphs(register_backend: Callable[..., None]) -> list[torch.fx.GraphModule]:
    """The graphs that the backend called BACKEND was given."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    register_backend(BACKEND, backend)
    return seen


def _step(model: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", [None, "rowwise"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_all_blocks_share_one_graph(recipe: str | None, mode: str, graphs: list, tiny_decoder: Build) -> None:
    model = tiny_decoder(4, recipe)
    section = ActivationCheckpointSection(mode=mode, selective_ac_option="op")
    compile_config = CompileSection(enable=True, backend=BACKEND)
    apply_activation_checkpointing(model, section, compile_config=compile_config)
    apply_compile(model, compile_config)
    loss, grads = _step(model)
    assert len(graphs) == 1
    plain_loss, plain_grads = _step(tiny_decoder(4, recipe))
    assert torch.equal(loss, plain_loss)
    for name, grad in plain_grads.items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize(
    ("mode", "recipe"),
    some_by_hand(product(("none", "full", "selective"), (None, "rowwise")), ("full", None), ("none", "rowwise")),
)
def test_rotations_by_operator_are_compiled_in_one_graph_and_change_no_bit(
    recipe: str | None, mode: str, monkeypatch: pytest.MonkeyPatch, tiny_decoder: Build
) -> None:
    expected_loss, expected_grads = _step(tiny_decoder(2, recipe))
    monkeypatch.setattr(rope, "_is_for_kernel", lambda x: True)
    torch._dynamo.reset()
    model = tiny_decoder(2, recipe)
    section = ActivationCheckpointSection(mode=mode, selective_ac_option="op")
    compile_config = CompileSection(enable=True, backend="aot_eager_decomp_partition")
    apply_activation_checkpointing(model, section, compile_config=compile_config)
    apply_compile(model, compile_config)
    loss, grads = _step(model)
    assert torch.equal(loss, expected_loss)
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad), name
    torch._dynamo.reset()


def _saved_bytes(model: Decoder) -> int:
    """Of the tensors that autograd holds between the passes, the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in own:
            saved[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(67, (2, 16)))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    ("rotates_by_operator", "recipe"),
    some_by_hand(product((False, True), (None, "tensorwise", "rowwise")), (False, "tensorwise"), (True, "rowwise")),
)
def test_full_recomputation_keeps_the_inputs_of_compiled_blocks_alone(
    rotates_by_operator: bool, recipe: str | None, monkeypatch: pytest.MonkeyPatch, tiny_decoder: Build
) -> None:
    """The more blocks, the more is saved: per block, one tensor `[T, dim]` and what attention's random state takes."""
    monkeypatch.setattr(rope, "_is_for_kernel", lambda x: rotates_by_operator)
    saved = []
    for n_layers in (2, 6):
        torch._dynamo.reset()
        model = tiny_decoder(n_layers, recipe)
        section = ActivationCheckpointSection(mode="full")
        compile_config = CompileSection(enable=True, backend="aot_eager_decomp_partition")
        apply_activation_checkpointing(model, section, compile_config=compile_config)
        apply_compile(model, compile_config)
        saved.append(_saved_bytes(model))
    block_input = 2 * 16 * 48 * 2
    random_state, rotary = 5056, 2 * 16 * 8 * 4
    assert (saved[1] - saved[0]) / 4 <= block_input + random_state + rotary


@pytest.mark.parametrize(("routes", "kinds"), [(True, 3), (False, 2)])
def test_around_experts_the_choice_of_them_is_one_graph_of_all_layers(
    routes: bool, kinds: int, graphs: list, tiny_decoder: Build
) -> None:
    """Beside those of the attention and of the shared experts."""
    experts = {"n_experts": 4, "top_k": 2, "n_shared_experts": 1, "moe_ffn_dim": 32, "balance_rate": 1e-3}
    expected = tiny_decoder(3, **experts)
    loss, grads = _step(expected)
    model = tiny_decoder(3, **experts)
    apply_compile(model, CompileSection(enable=True, backend=BACKEND), around_experts=True, routes=routes)
    compiled_loss, compiled_grads = _step(model)
    assert len(graphs) == kinds
    assert any("topk" in str(node.target) for graph in graphs for node in graph.graph.nodes) is routes
    assert torch.equal(compiled_loss, loss)
    assert all(torch.equal(compiled_grads[name], grad) for name, grad in grads.items())
    for mine, theirs in zip(model.layers.values(), expected.layers.values(), strict=True):
        assert mine.moe.tokens_per_expert.sum() == 2 * 16 * 2
        assert torch.equal(mine.moe.tokens_per_expert, theirs.moe.tokens_per_expert)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_compiled_by_inductor_share_one_compilation(tiny_decoder: Build) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_decoder(3, "rowwise")
    apply_compile(model, CompileSection(enable=True))
    with torch.no_grad():
        model(torch.randint(67, (2, 16)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_validation_after_training_adds_one_graph(graphs: list, tiny_decoder: Build) -> None:
    model = tiny_decoder(3)
    apply_compile(model, CompileSection(enable=True, backend=BACKEND))
    for _ in range(2):
        _step(model)
        with torch.no_grad():
            model(torch.zeros(2, 16, dtype=torch.int64))
    assert len(graphs) == 2


def test_compiled_modules_and_parameters_keep_their_names(graphs: list, tiny_decoder: Build) -> None:
    model, plain = tiny_decoder(2), tiny_decoder(2)
    apply_compile(model, CompileSection(enable=True, backend=BACKEND))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize(
    ("enable", "components", "expected"),
    [(False, ["model", "loss"], 0), (True, ["model"], 1), (True, ["loss"], 1), (True, ["model", "loss"], 2)],
)
def test_only_the_components_named_are_compiled(
    enable: bool, components: list, expected: int, graphs: list, tiny_decoder: Build
) -> None:
    section = CompileSection(enable=enable, components=components, backend=BACKEND)
    model = tiny_decoder(2)
    apply_compile(model, section)
    loss = compile_loss(cross_entropy_sum, section)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    assert torch.equal(loss(model(tokens), tokens), cross_entropy_sum(tiny_decoder(2)(tokens), tokens))
    assert len(graphs) == expected


def test_an_unknown_backend_is_refused_with_the_nearest_name(tiny_decoder: Build) -> None:
    section = CompileSection(enable=True, backend="inducter")
    with pytest.raises(UserError, match=r'compile\.backend = "inducter": no such backend .*did you mean "inductor"'):
        apply_compile(tiny_decoder(1), section)
    with pytest.raises(UserError, match="no such backend"):
        compile_loss(cross_entropy_sum, section)


def test_a_backend_is_not_looked_at_when_nothing_is_compiled(tiny_decoder: Build) -> None:
    apply_compile(tiny_decoder(1), CompileSection(backend="inducter"))


@pytest.fixture
def memory_budget_put_back() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(
        activation_memory_budget=1.0,
        visualize_memory_budget_pareto=False,
        memory_budget_pareto_dir=None,
        enable_autograd_cache=False,
    ):
        yield
    torch._dynamo.reset()


def _compile_with_budget(model: Decoder, budget: float, picture_folder: Path | None = None) -> Decoder:
    section = ActivationCheckpointSection(
        mode="memory_budget", memory_budget=budget, visualize_memory_budget_pareto=picture_folder is not None
    )
    compile_config = CompileSection(enable=True, backend="aot_eager_decomp_partition")
    apply_activation_checkpointing(model, section, compile_config=compile_config, dump_folder=picture_folder)
    apply_compile(model, compile_config)
    return model


def _kept_bytes(model: Decoder, budget: float, picture_folder: Path | None = None) -> int:
    """Bytes that a forward pass of the compiled model keeps for the backward pass, parameters left out."""
    _compile_with_budget(model, budget, picture_folder)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(32, 16, dtype=torch.int64))
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


@pytest.mark.usefixtures("memory_budget_put_back")
def test_a_small_memory_budget_keeps_less_for_the_backward_pass(tiny_decoder: Build) -> None:
    nothing = _kept_bytes(tiny_decoder(1), 0.0)
    torch._dynamo.reset()
    assert nothing < 0.7 * _kept_bytes(tiny_decoder(1), 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("memory_budget_put_back")
def test_in_mxfp8_a_small_memory_budget_keeps_less_and_changes_no_bit(tiny_decoder: Build) -> None:
    results = []
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        kept = _kept_bytes(tiny_decoder(1, "mxfp8_cublas_rceil"), budget)
        torch._dynamo.reset()
        results.append((kept, *_step(_compile_with_budget(tiny_decoder(1, "mxfp8_cublas_rceil"), budget))))
    (kept, loss, grads), (kept_of_small, loss_of_small, grads_of_small) = results
    assert kept_of_small < 0.7 * kept
    assert torch.equal(loss, loss_of_small)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_of_small[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("memory_budget_put_back")
def test_the_picture_of_the_memory_budget_lies_in_the_runs_folder(tiny_decoder: Build, tmp_path: Path) -> None:
    _kept_bytes(tiny_decoder(1), 0.5, picture_folder=tmp_path)
    assert [path.suffix for path in (tmp_path / "memory_budget_pareto").iterdir()] == [".svg"]


@pytest.mark.slow
def test_inductor_computes_what_eager_code_computes(tiny_decoder: Build) -> None:
    model, plain = tiny_decoder(1), tiny_decoder(1)
    apply_compile(model, CompileSection(enable=True))
    loss, grads = _step(model)
    plain_loss, plain_grads = _step(plain)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-3)
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 0.02 * grad.norm(), name
