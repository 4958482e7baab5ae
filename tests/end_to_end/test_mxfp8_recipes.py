"""The MXFP8 recipes of `train_configs/` on two ranks, compiled: small sizes, all else theirs; losses and gradients are
those of one process."""

from pathlib import Path

import pytest

from tests.distributed.trainings import FLOAT8_CODES, Mesh, Options, Run, assert_same, run_on, train_afresh

REPO = Path(__file__).resolve().parents[2]
STEPS = 3
COMPILED = {"compile.backend": "aot_eager", "compile.components": "model"}
ALONE = {"compile.enable": "false"}
RECIPES: dict[str, tuple[str, Options, Options]] = {
    "mxfp8_llama3_8b": (
        "fsdp2",
        {"model.overrides.n_layers": "1"},
        {"quantize.linear.mx.enable_fsdp_mxfp8_all_gather": "true", "activation_checkpoint.mode": "selective"},
    ),
    "mxfp8_llama4_17bx16e": (
        "fsdp2 ep2",
        {
            "model.name": "llama4",
            "model.overrides.n_layers": "1",
            "model.overrides.n_experts": "4",
            "model.overrides.moe_ffn_dim": "64",
        },
        {},
    ),
}
"""Axes, sizes, and what two ranks have besides."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_trains_on_two_ranks_as_in_one_process(name: str, tmp_path: Path) -> None:
    axes, sizes, besides = RECIPES[name]

    def run(axes: str, options: Options) -> Run:
        config = {"job.config_file": str(REPO / "train_configs" / f"{name}.toml")}
        mesh = Mesh(axes, tuple({**config, **sizes, **options}.items()))
        return run_on(mesh, tmp_path, steps=STEPS, how=train_afresh)

    one = run("fsdp1 ep1", ALONE)
    assert_same(run(axes, COMPILED | besides), one, *FLOAT8_CODES)
    assert run("fsdp1 ep1", ALONE | {"model.converters": ""}).losses != one.losses
