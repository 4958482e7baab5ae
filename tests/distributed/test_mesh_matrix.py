"""Every kind of parallelism and their products, through the trainer: six steps equal one process, by loss and gradient.

A step has four sequences, each a microbatch of its own, so that dynamic scales belong to the same values on every
mesh: one process accumulates over four, two data-parallel ranks over two each, a pipeline cuts its batch into them.
Weights, data and order are the trainer's own. fp32 activations; float8 emulated.
"""

from pathlib import Path

import pytest

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.trainings import (
    COMPILED,
    FLOAT8,
    FLOAT8_CODES,
    HIGH_PRECISION,
    LOCAL_SCALES,
    STEPS,
    Mesh,
    Run,
    assert_same,
    run_alone,
    run_on,
    train,
)

MX = "quantize.linear.mx"


def converted(recipe: str | None) -> dict[str, str]:
    """The options of a recipe; None converts nothing."""
    if recipe is None:
        return {}
    if recipe.startswith("mxfp8"):
        return {"model.converters": MX, f"{MX}.recipe_name": recipe, f"{MX}.emulate": "true"}
    name = f"{FLOAT8}.recipe_name"
    return {"model.converters": FLOAT8, name: recipe, f"{FLOAT8}.filter_fqns": "output", f"{FLOAT8}.emulate": "true"}


def alone(recipe: str | None) -> Run:
    return run_alone(converted(recipe))


ZERO_BUBBLE = (
    ("parallelism.pipeline_parallel_schedule", "InterleavedZeroBubble"),
    (
        "parallelism.module_fqns_per_model_part",
        '[["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output"]]',
    ),
)
PLAIN = [
    Mesh("fsdp2", (("training.loss_chunk_tokens", "20"),)),
    Mesh("tp2"),
    Mesh("cp2"),
    Mesh("pp2"),
    Mesh("rep2 fsdp2"),
    Mesh("fsdp2 tp2"),
    Mesh("cp2 tp2", (("parallelism.context_parallel_rotate_method", "alltoall"),)),
    Mesh("pp2 tp2", ZERO_BUBBLE),
    Mesh("pp2 fsdp2", (("optimizer.implementation", "one_pass"),)),
    Mesh("pp2 cp2"),
    Mesh("fsdp2 cp2", (("activation_checkpoint.mode", "full"), ("training.loss_chunk_tokens", "7"))),
    Mesh("rep2 cp2"),
]
CODES = [
    Mesh("tp2"),
    Mesh("pp2", ZERO_BUBBLE),
    Mesh("fsdp2 tp2", ((f"{FLOAT8}.enable_fsdp_float8_all_gather", "true"),)),
    Mesh("pp2 tp2"),
    Mesh("rep2 fsdp2", ((f"{FLOAT8}.enable_fsdp_float8_all_gather", "true"),)),
]
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
BY_HAND = {
    "tp2": ("tensorwise", "rowwise"),
    "pp2": ("rowwise", "rowwise_with_gw_hp"),
    "fsdp2 tp2": ("rowwise", "rowwise_with_gw_hp"),
    "pp2 tp2": ("tensorwise", "blockwise"),
    "rep2 fsdp2": ("tensorwise", "blockwise"),
}
"""Recipes that a mesh is run with by hand alone. Of each mesh two are left, and of each recipe FSDP, a pipeline and
tensor parallelism."""
WIDE = [
    Mesh("pp2 fsdp2 tp2"),
    Mesh("rep2 fsdp2 tp2"),
    Mesh("fsdp2 cp2 tp2"),
    Mesh("rep2 cp2 tp2"),
    Mesh("pp2 cp2 tp2"),
    Mesh("pp2 rep2 tp2"),
    Mesh("fsdp4 tp2"),
    Mesh("tp4 fsdp2"),
]


@pytest.mark.parametrize("mesh", PLAIN, ids=lambda mesh: mesh.axes.replace(" ", "_"))
def test_high_precision(mesh: Mesh, tmp_path: Path) -> None:
    assert_same(run_on(mesh, tmp_path), alone(None), *HIGH_PRECISION)


VALIDATION = {
    "validation.enable": "true",
    "validation.dataset": "synthetic",
    "validation.freq": str(STEPS // 2),
    "validation.steps": "1",
    "validation.seq_len": "48",
}
"""Of other lengths than the training's, and in a pipeline of an odd number of microbatches."""


def validated_alone() -> Run:
    return run_alone({**VALIDATION, "validation.local_batch_size": "6"})


@pytest.mark.parametrize(("axes", "sequences"), [("tp2", 6), ("fsdp2 cp2", 3), ("pp2 tp2", 6), ("pp2 fsdp2", 3)])
def test_validation(axes: str, sequences: int, tmp_path: Path) -> None:
    options = {**VALIDATION, "validation.local_batch_size": str(sequences)}
    if "cp" in axes:
        options["training.loss_chunk_tokens"] = "100"
    run, expected = run_on(Mesh(axes, tuple(options.items())), tmp_path), validated_alone()
    assert_same(run, expected, *HIGH_PRECISION)
    assert len(run.validated) == 2
    assert run.validated == pytest.approx(expected.validated, rel=2e-6)
    assert expected.losses == alone(None).losses, "training goes on as if nothing had been validated"


@pytest.mark.parametrize(
    ("mesh", "recipe"),
    [
        pytest.param(
            mesh,
            recipe,
            id=f"{mesh.axes.replace(' ', '_')}-{recipe}",
            marks=[pytest.mark.slow] if recipe in BY_HAND[mesh.axes] else [],
        )
        for mesh in CODES
        for recipe in RECIPES
    ],
)
def test_float8(mesh: Mesh, recipe: str, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, (*converted(recipe).items(), *mesh.options))
    assert_same(run_on(mesh, tmp_path), alone(recipe), *FLOAT8_CODES)


GATHERED_AHEAD = {
    f"{FLOAT8}.enable_fsdp_float8_all_gather": "true",
    f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": "true",
}


@pytest.mark.parametrize("mesh", [Mesh("fsdp2", tuple(GATHERED_AHEAD.items())), Mesh("rep2")], ids=lambda m: m.axes)
def test_mixed_recipes(mesh: Mesh, tmp_path: Path) -> None:
    mixture = {**converted("tensorwise"), f"{FLOAT8}.recipe_by_fqn": "attention.wo=blockwise,attention.wq=rowwise"}
    run = run_on(Mesh(mesh.axes, (*mixture.items(), *mesh.options)), tmp_path)
    assert_same(run, run_alone(mixture), *FLOAT8_CODES)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh("tp2"),
        Mesh("pp2", ZERO_BUBBLE),
        pytest.param(Mesh("fsdp2 tp2", tuple(COMPILED.items())), marks=pytest.mark.slow),
        Mesh("rep2 fsdp2", (("activation_checkpoint.mode", "selective"),)),
        Mesh("pp2 fsdp2", ((f"{MX}.enable_fsdp_mxfp8_all_gather", "true"),)),
        pytest.param(Mesh("cp2 tp2"), marks=pytest.mark.slow),
        pytest.param(Mesh("fsdp2 tp2", (("compile.enable", "true"),)), marks=pytest.mark.slow, id="fsdp2_tp2_inductor"),
    ],
    ids=lambda mesh: mesh.axes.replace(" ", "_"),
)
def test_mxfp8(mesh: Mesh, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, (*converted("mxfp8_cublas_rceil").items(), *mesh.options))
    tolerances = LOCAL_SCALES if "cp" in mesh.axes else FLOAT8_CODES
    assert_same(run_on(mesh, tmp_path), alone("mxfp8_cublas_rceil"), *tolerances)


def of_recipes(*kept: str) -> pytest.MarkDecorator:
    """A parameter `recipe`: those that are not kept are run by hand."""
    by_hand = [recipe for recipe in RECIPES if recipe not in kept]
    return pytest.mark.parametrize("recipe", some_by_hand(RECIPES, *by_hand))


# Scales that are local to a rank's tokens, of blocks.
@of_recipes("blockwise")
def test_float8_of_spread_sequences(recipe: str, tmp_path: Path) -> None:
    mesh = Mesh("cp2 tp2", tuple(converted(recipe).items()))
    assert_same(run_on(mesh, tmp_path), alone(recipe), *LOCAL_SCALES)


# One scale of all ranks' parts of the table, and scales of blocks that no part cuts.
@of_recipes("tensorwise", "blockwise")
def test_a_float8_head_that_computes_the_loss_some_tokens_at_a_time(recipe: str, tmp_path: Path) -> None:
    """Bit for bit: each rank has one microbatch, two addends have one sum, and nothing is clipped."""
    options = converted(recipe) | {
        f"{FLOAT8}.filter_fqns": "layers.0",
        "model.overrides.vocab_size": "384",  # whole blocks
        "training.seq_len": "384",  # as many tokens as rows: the table is gathered, sums are in one order
        "training.global_batch_size": "2",
        "training.max_norm": "0",
        "training.mixed_precision_param": "bfloat16",
        "training.loss_chunk_tokens": "100",
    }
    wanted = run_on(Mesh("fsdp1", tuple(options.items())), tmp_path)
    for all_gather in ("false", "true"):
        mesh = Mesh("fsdp2", (*options.items(), (f"{FLOAT8}.enable_fsdp_float8_all_gather", all_gather)))
        assert_same(run_on(mesh, tmp_path), wanted, loss_tolerance=1e-6, grad_tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "recipe"),
    [
        pytest.param(mesh, recipe, id=f"{mesh.axes.replace(' ', '_')}-{recipe}")
        for mesh in WIDE
        for recipe in (None, "tensorwise", "rowwise", "blockwise")
        if not (recipe == "blockwise" and "tp4" in mesh.axes)  # a part would be narrower than a block, which is refused
    ],
)
def test_eight_ranks(mesh: Mesh, recipe: str | None, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, tuple(converted(recipe).items()))
    tolerances = HIGH_PRECISION if recipe is None else LOCAL_SCALES if "cp" in mesh.axes else FLOAT8_CODES
    assert_same(run_on(mesh, tmp_path), alone(recipe), *tolerances)


@pytest.mark.parametrize(
    ("before", "after", "recipe"),
    [
        (Mesh("fsdp4"), Mesh("pp2 tp2"), "rowwise"),
        (Mesh("pp2 tp2"), Mesh("fsdp2 cp2"), "rowwise"),
        (Mesh("fsdp2 tp2"), Mesh("fsdp1"), "rowwise"),
        (Mesh("fsdp2 tp2"), Mesh("fsdp1"), None),
    ],
    ids=lambda value: value.axes.replace(" ", "_") if isinstance(value, Mesh) else str(value),
)
def test_a_checkpoint_is_resumed_on_another_mesh(before: Mesh, after: Mesh, recipe: str | None, tmp_path: Path) -> None:
    half = STEPS // 2
    options = {**converted(recipe), "checkpoint.enable": "true", "checkpoint.interval": str(half)}
    first, second = (Mesh(mesh.axes, tuple(options.items())) for mesh in (before, after))
    run_distributed(train, first.ranks, first.arguments(), str(tmp_path), half)
    resumed = run_on(second, tmp_path)
    expected = alone(recipe)
    assert len(resumed.losses) == STEPS - half
    local = "cp" in after.axes + before.axes
    tolerances = HIGH_PRECISION if recipe is None else LOCAL_SCALES if local else FLOAT8_CODES
    wanted = Run(expected.losses[half:], expected.norms[half:], expected.grads)
    assert_same(resumed, wanted, *tolerances, from_start=False)
