"""Activation checkpointing: what is computed twice is what the mode says, and nothing else changes."""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy

from titan_fp8.models import rope
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.parallel.activation_checkpoint import _tells_what_is_kept, apply_activation_checkpointing
from titan_fp8.parallel.compile import apply_compile
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.quantization.mx_ops import emulated_mm
from titan_fp8.quantization.ops import GEMM_OPS
from titan_fp8.quantization.ops import amax as amax_op
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.operators import visited

Build = Callable[..., Decoder]
EAGER, COMPILED = CompileSection(), CompileSection(enable=True)
LAYERS, LINEARS = 3, 7  # linears of a block; the output head is one more, outside of all blocks
GEMMS = {torch.ops.aten.mm.default, *GEMM_OPS, emulated_mm}
RECIPES = pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise", "mxfp8_emulated"])
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
# What Dynamo does to trace is not ours.
IN_THE_COMPILER = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
    "ignore:.*Function'> should not be instantiated:DeprecationWarning",
)


class _Count(TorchDispatchMode):
    """Counts the operations that are really carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))

    def of(self, ops: set[object]) -> int:
        return sum(op in ops for op in self.ops)


def _run(model: Decoder, section: ActivationCheckpointSection) -> tuple[Tensor, dict[str, Tensor], _Count, _Count]:
    """Loss, gradients, operations of the forward pass, operations of the backward pass."""
    apply_activation_checkpointing(model, section, compile_config=EAGER)
    tokens = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(0))
    with _Count() as forward:
        loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    with _Count() as backward:
        loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), grads, forward, backward


def _section(**keys: object) -> ActivationCheckpointSection:
    return ActivationCheckpointSection(**keys)


# mode -> matrix products and attentions computed again in the backward pass of three blocks
RECOMPUTED = {
    "none": (_section(mode="none"), 0, 0),
    "full": (_section(mode="full"), LAYERS * LINEARS, LAYERS),
    "every second block": (_section(selective_ac_option="2"), 1 * LINEARS, 1),
    "of three blocks the first": (_section(selective_ac_option="3"), 1 * LINEARS, 1),
    "of more than there are the first": (_section(selective_ac_option="4"), 1 * LINEARS, 1),
    "every block": (_section(selective_ac_option="1"), LAYERS * LINEARS, LAYERS),
    "op": (_section(selective_ac_option="op"), LAYERS * 3, 0),
    # wk's shape is wv's too: of the other five linears every second one is kept
    "op without wk's shape": (
        _section(selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=["attention.wk"]),
        LAYERS * (2 + 2),
        0,
    ),
}


@RECIPES
@pytest.mark.parametrize("mode", RECOMPUTED)
def test_gemms_and_attention_are_recomputed_as_the_mode_says(
    mode: str, recipe: str | None, tiny_decoder: Build
) -> None:
    section, gemms, attentions = RECOMPUTED[mode]
    _, _, forward, backward = _run(tiny_decoder(LAYERS, recipe), section)
    assert forward.of(GEMMS) == LAYERS * LINEARS + 1
    assert backward.of(GEMMS) == 2 * (LAYERS * LINEARS + 1) + gemms
    assert forward.of(ATTENTION) == LAYERS
    assert backward.of(ATTENTION) == attentions


def test_where_not_all_blocks_are_recomputed_the_last_is_not(tiny_decoder: Build) -> None:
    """Its memory is needed for the loss and freed right after: recomputing it would lower no peak."""
    for layers, option, expected in (
        (4, "1", "0123"), (4, "2", "02"), (5, "2", "02"), (4, "3", "0"), (5, "3", "03"), (3, "9", "0"), (1, "2", "0")
    ):  # fmt: skip
        model = tiny_decoder(layers)
        before = {name: block.forward for name, block in model.layers.items()}
        apply_activation_checkpointing(model, _section(selective_ac_option=option), compile_config=EAGER)
        changed = [name for name, block in model.layers.items() if block.forward != before[name]]
        assert "".join(changed) == expected, (layers, option)


@RECIPES
def test_loss_and_gradients_are_the_same_bits_in_every_mode(recipe: str | None, tiny_decoder: Build) -> None:
    loss, grads, _, _ = _run(tiny_decoder(LAYERS, recipe), _section(mode="none"))
    for mode, (section, _, _) in RECOMPUTED.items():
        other_loss, other_grads, _, _ = _run(tiny_decoder(LAYERS, recipe), section)
        assert torch.equal(other_loss, loss), mode
        assert list(other_grads) == list(grads)
        for name, grad in grads.items():
            assert torch.equal(other_grads[name], grad), f"{mode}: {name}"


def _told_run(model: Decoder, section: ActivationCheckpointSection, *, is_local: bool) -> tuple[Any, ...]:
    """Loss and gradients; the package's operators that are carried out, and attentions, forward and backward; the
    dispatch modes that watch feed-forwards, at most."""
    apply_activation_checkpointing(model, section, compile_config=EAGER, is_local=is_local)
    seen: tuple[list[Any], list[Any]] = [], []
    modes: list[int] = []
    for block in model.layers.values():
        block.feed_forward.register_forward_pre_hook(lambda *_: modes.append(len(_get_current_dispatch_mode_stack())))

    def into(found: list[Any]) -> Any:
        return visited(lambda op, compute, args, kwargs: found.append(op) or compute(*args, **kwargs))

    tokens = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(0))
    with into(seen[0]):
        loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    with into(seen[1]):
        loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), grads, *(Counter(found) for found in seen), max(modes)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_emulated"])
@pytest.mark.parametrize("mode", ["op", "op without wk's shape"])
def test_without_dispatch_modes_the_same_is_kept_and_no_bit_changes(
    mode: str, recipe: str, tiny_decoder: Build
) -> None:
    section, _, attentions = RECOMPUTED[mode]
    loss, grads, forward, backward, modes = _told_run(tiny_decoder(LAYERS, recipe), section, is_local=True)
    assert modes == 0
    assert sum(forward[op] for op in GEMMS) == LAYERS * LINEARS
    wanted_loss, wanted, wanted_forward, wanted_backward, modes = _told_run(
        tiny_decoder(LAYERS, recipe), section, is_local=False
    )
    assert modes > 0
    (attention,) = ATTENTION
    assert (forward[attention], backward[attention]) == (LAYERS, attentions)
    for op in (*GEMMS, amax_op):
        assert (forward[op], backward[op]) == (wanted_forward[op], wanted_backward[op]), op
    # Without modes the first pass knows that it will be run again, and makes no codes that only backward needs.
    assert sum(forward.values()) <= sum(wanted_forward.values())
    assert torch.equal(loss, wanted_loss)
    assert list(grads) == list(wanted)
    assert all(torch.equal(grad, wanted[name]) for name, grad in grads.items())


def _filtered(model: Decoder) -> None:
    attention = model.layers["1"].attention
    attention.wk = nn.Linear(attention.wk.in_features, attention.wk.out_features, bias=False)


def _flex(model: Decoder) -> None:
    for block in model.layers.values():
        block.attention.backend = "flex"


@pytest.mark.parametrize("change", [_filtered, _flex])
def test_a_block_with_operations_that_do_not_tell_of_themselves_is_watched(
    change: Callable[[Decoder], None], tiny_decoder: Build
) -> None:
    model = tiny_decoder(LAYERS, "tensorwise")
    change(model)
    watched = [not _tells_what_is_kept(block) for block in model.layers.values()]
    assert watched == ([False, True, False] if change is _filtered else [True] * 3)


def test_amax_is_not_searched_for_again_in_the_per_op_mode(tiny_decoder: Build) -> None:
    _, _, _, kept = _run(tiny_decoder(LAYERS, "tensorwise"), _section(mode="none"))
    _, _, _, per_op = _run(tiny_decoder(LAYERS, "tensorwise"), _section(selective_ac_option="op"))
    assert per_op.of({amax_op}) == kept.of({amax_op})


@pytest.mark.parametrize("option", ["op", "1"])
def test_rotations_are_computed_again_and_not_kept(
    option: str, monkeypatch: pytest.MonkeyPatch, tiny_decoder: Build
) -> None:
    monkeypatch.setattr(rope, "_is_for_kernel", lambda x: True)
    loss, grads, forward, kept = _run(tiny_decoder(LAYERS), _section(mode="none"))
    other_loss, other_grads, _, again = _run(tiny_decoder(LAYERS), _section(selective_ac_option=option))
    assert [count.of({rope.rotate_op}) for count in (forward, kept, again)] == [LAYERS, LAYERS, 2 * LAYERS]
    assert torch.equal(other_loss, loss)
    assert all(torch.equal(other_grads[name], grad) for name, grad in grads.items())


def test_early_stop_leaves_out_the_end_of_the_block(tiny_decoder: Build) -> None:
    *_, to_the_end = _run(tiny_decoder(), _section(mode="full", early_stop=False))
    *_, stopped = _run(tiny_decoder(), _section(mode="full", early_stop=True))
    assert to_the_end.of(GEMMS) - stopped.of(GEMMS) == LAYERS  # w2's result is not needed by its own gradients


def test_the_modules_keep_their_names(tiny_decoder: Build) -> None:
    model, plain = tiny_decoder(), tiny_decoder()
    apply_activation_checkpointing(model, _section(mode="full"), compile_config=EAGER)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("preserve", "expected"), [(True, True), (False, False)])
def test_random_layers_repeat_themselves_if_the_random_state_is_preserved(
    preserve: bool, expected: bool, tiny_decoder: Build
) -> None:
    def grads(**keys: object) -> Tensor:
        model = tiny_decoder(1)
        block = model.layers["0"]
        deterministic_forward = block.forward
        block.forward = lambda *args: F.dropout(deterministic_forward(*args), 0.5) ** 2
        torch.manual_seed(0)
        return _run(model, _section(**keys))[1]["layers.0.feed_forward.w2.weight"]

    recomputed = grads(mode="full", preserve_rng_state=preserve)
    assert torch.equal(grads(mode="none"), recomputed) is expected


@pytest.mark.parametrize(
    ("debug", "message"), [(False, "different metadata"), (True, "Operations executed during recomputation")]
)
def test_debug_lists_the_operations_of_a_recomputation_that_differs(
    debug: bool, message: str, tiny_decoder: Build
) -> None:
    model = tiny_decoder(1)
    block, calls = model.layers["0"], []
    forward = block.forward

    def changing(x: Tensor, *args: object) -> Tensor:
        calls.append(None)
        return forward(x, *args) if len(calls) == 1 else forward(torch.cat([x, x]), *args)[: len(x)]

    block.forward = changing
    with pytest.raises(RuntimeError, match=message):
        _run(model, _section(mode="full", debug=debug))


def test_the_determinism_check_can_be_turned_off(tiny_decoder: Build) -> None:
    model = tiny_decoder(1)
    apply_activation_checkpointing(model, _section(mode="full", determinism_check="none"), compile_config=EAGER)
    options = inspect.getclosurevars(model.layers["0"].forward).nonlocals["options"]
    assert options["determinism_check"] == "none"


def test_debug_with_the_per_op_mode_is_refused(tiny_decoder: Build) -> None:
    with pytest.raises(UserError, match=r"activation_checkpoint\.debug does not work with selective_ac_option"):
        apply_activation_checkpointing(
            tiny_decoder(1), _section(selective_ac_option="op", debug=True), compile_config=EAGER
        )


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_debug_of_a_compiled_model_is_refused(mode: str, tiny_decoder: Build) -> None:
    section = _section(mode=mode, selective_ac_option="2", debug=True)
    compiled = CompileSection(enable=True)
    with pytest.raises(UserError, match=r"activation_checkpoint\.debug records .* but the model is compiled"):
        apply_activation_checkpointing(tiny_decoder(1), section, compile_config=compiled)
    loss_alone = CompileSection(enable=True, components=["loss"])
    apply_activation_checkpointing(tiny_decoder(1), section, compile_config=loss_alone)


@pytest.mark.parametrize("option", ["1", "2"])
def test_blocks_for_the_compiler_name_what_to_recompute(option: str, tiny_decoder: Build) -> None:
    """Which the compiler of PyTorch 2.11 needs to recompute what lies in an autograd function."""
    model = tiny_decoder(2)
    section = _section(mode="selective", selective_ac_option=option)
    apply_activation_checkpointing(model, section, compile_config=CompileSection(enable=True))
    options = inspect.getclosurevars(model.layers["0"].forward).nonlocals["options"]
    first_pass, _ = options["context_fn"]()
    for op in (torch.ops.aten.mm.default, *GEMM_OPS):
        assert first_pass.policy_fn(None, op) == CheckpointPolicy.PREFER_RECOMPUTE


EXPERTS = {"n_experts": 4, "top_k": 2, "n_shared_experts": 1, "moe_ffn_dim": 32, "first_dense_layers": 1}
KEEPING = "keep_codes_for_a_test"


@pytest.fixture
def codes_of_graphs(register_backend: Callable[..., None]) -> list[StorageWeakRef]:
    """The memory of float8 codes that come out of forward graphs compiled by the backend called KEEPING."""
    codes: list[StorageWeakRef] = []

    def forward_compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        def run(*args: object) -> object:
            results = graph(*args)
            codes.extend(StorageWeakRef(t.untyped_storage()) for t in results if isinstance(t, Tensor) and _is_fp8(t))
            return results

        return make_boxed_func(run)

    def backward_compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        return make_boxed_func(graph.forward)

    register_backend(KEEPING, aot_autograd(fw_compiler=forward_compiler, bw_compiler=backward_compiler))
    return codes


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _compiled_in_parts(build: Build, section: ActivationCheckpointSection, layers: int = LAYERS) -> Decoder:
    """A dense block and others with experts, checkpointed and compiled as expert parallelism has it."""
    model = build(layers, "rowwise", **EXPERTS)
    compiled = CompileSection(enable=True, backend=KEEPING)
    apply_activation_checkpointing(model, section, compile_config=compiled, around_experts=True)
    apply_compile(model, compiled, around_experts=True)
    return model


@IN_THE_COMPILER
@pytest.mark.parametrize(("option", "layers", "recomputed"), [("1", 3, 2), ("2", 4, 1)])
def test_no_mode_watches_a_block_with_experts_of_which_parts_are_compiled(
    option: str, layers: int, recomputed: int, tiny_decoder: Build, codes_of_graphs: list[StorageWeakRef]
) -> None:
    """Every operator between the parts would go through it in Python."""
    model = _compiled_in_parts(tiny_decoder, _section(selective_ac_option=option), layers)
    modes: list[int] = []
    for block in model.layers.values():
        if block.moe is not None:
            block.moe.experts.register_forward_pre_hook(
                lambda *_: modes.append(len(_get_current_dispatch_mode_stack()))
            )
    model(torch.randint(67, (2, 16))).sum().backward()
    assert modes == [0] * (layers - 1 + recomputed)


@IN_THE_COMPILER
def test_codes_of_compiled_parts_of_a_block_with_experts_are_computed_again_and_not_kept(
    tiny_decoder: Build, codes_of_graphs: list[StorageWeakRef]
) -> None:
    outputs = {}
    for mode in ("none", "full"):
        codes_of_graphs.clear()
        torch._dynamo.reset()
        model = _compiled_in_parts(tiny_decoder, _section(mode=mode))
        loss = model(torch.arange(32).view(2, 16)).sum()
        made = len(codes_of_graphs)
        kept = sum(not each.expired() for each in codes_of_graphs)
        assert made
        assert kept == (made if mode == "none" else 0)
        loss.backward()
        again = len(codes_of_graphs) - made
        assert again == (0 if mode == "none" else made), "a compiled forward pass that is repeated gives the same"
        outputs[mode] = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert torch.equal(outputs["none"][0], outputs["full"][0])
    for name, grad in outputs["none"][1].items():
        assert torch.equal(grad, outputs["full"][1][name]), name


@pytest.mark.parametrize("pattern", ["feed_forward.w4", "w", "layers.1.attention.wq.weight", "ers.0", "attention.w[q]"])
def test_a_forced_recomputation_that_matches_no_linear_is_refused(pattern: str, tiny_decoder: Build) -> None:
    section = _section(selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=[pattern])
    with pytest.raises(UserError, match=re.escape(f'"{pattern}" matches no linear')):
        apply_activation_checkpointing(tiny_decoder(2), section, compile_config=EAGER)


def test_a_misspelt_forced_recomputation_gets_a_suggestion(tiny_decoder: Build) -> None:
    section = _section(selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=["feed_foward.w1"])
    with pytest.raises(UserError, match=r'did you mean "feed_forward\.w1"\?'):
        apply_activation_checkpointing(tiny_decoder(1), section, compile_config=EAGER)


def test_the_default_names_may_match_nothing_also_when_they_are_written_out(tiny_decoder: Build) -> None:
    default = ActivationCheckpointSection().per_op_sac_force_recompute_mm_shapes_by_fqns
    section = _section(selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=list(default))
    apply_activation_checkpointing(tiny_decoder(1), section, compile_config=EAGER)


@pytest.mark.parametrize("pattern", ["layers.1", "layers.*.attention.wq", "feed_forward.*", "output"])
def test_patterns_match_runs_of_whole_components(pattern: str, tiny_decoder: Build) -> None:
    section = _section(selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=[pattern])
    apply_activation_checkpointing(tiny_decoder(2), section, compile_config=EAGER)


# ---- memory budget


@pytest.fixture
def compiler_settings(monkeypatch: pytest.MonkeyPatch):
    """The compiler's settings, put back after the test."""
    config = torch._functorch.config
    with config.patch(
        activation_memory_budget=config.activation_memory_budget,
        visualize_memory_budget_pareto=config.visualize_memory_budget_pareto,
        memory_budget_pareto_dir=config.memory_budget_pareto_dir,
    ):
        yield config


def test_a_memory_budget_needs_the_compiler(tiny_decoder: Build) -> None:
    with pytest.raises(UserError, match=r"the model is not compiled; set compile\.enable"):
        apply_activation_checkpointing(tiny_decoder(1), _section(mode="memory_budget"), compile_config=EAGER)


@pytest.mark.parametrize(
    ("compile_config", "message"),
    [
        (CompileSection(enable=True, components=["loss"]), "the model is not compiled"),
        (
            CompileSection(enable=True, backend="aot_eager"),
            'compile.backend = "aot_eager" keeps no budget; use inductor',
        ),
    ],
)
def test_a_memory_budget_needs_a_compiler_that_keeps_it(
    compile_config: CompileSection, message: str, tiny_decoder: Build
) -> None:
    with pytest.raises(UserError, match=message):
        apply_activation_checkpointing(tiny_decoder(1), _section(mode="memory_budget"), compile_config=compile_config)


def test_a_memory_budget_reaches_the_compiler(compiler_settings, tiny_decoder: Build, tmp_path: Path) -> None:
    section = _section(mode="memory_budget", memory_budget=0.3, visualize_memory_budget_pareto=True)
    apply_activation_checkpointing(tiny_decoder(1), section, compile_config=COMPILED, dump_folder=tmp_path)
    assert compiler_settings.activation_memory_budget == 0.3
    assert compiler_settings.visualize_memory_budget_pareto
    assert Path(compiler_settings.memory_budget_pareto_dir).parent == tmp_path


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_a_picture_of_no_choice_is_refused(budget: float, compiler_settings, tiny_decoder: Build) -> None:
    section = _section(mode="memory_budget", memory_budget=budget, visualize_memory_budget_pareto=True)
    with pytest.raises(UserError, match=f"memory_budget = {budget:g} there is nothing to choose"):
        apply_activation_checkpointing(tiny_decoder(1), section, compile_config=COMPILED)


def test_a_picture_without_matplotlib_is_refused(
    compiler_settings, tiny_decoder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_fp8.parallel.activation_checkpoint.find_spec", lambda name: None)
    section = _section(mode="memory_budget", visualize_memory_budget_pareto=True)
    with pytest.raises(UserError, match="draws with matplotlib, which is not installed"):
        apply_activation_checkpointing(tiny_decoder(1), section, compile_config=COMPILED, dump_folder=tmp_path)
