"""Models that tensor parallelism cannot divide: each module is named, with the rule and the remedy."""

import pytest
import torch
from torch import nn

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.linear import Linear
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.splits import division_problem, local_dims
from titan_fp8.parallel.apply import check_parallelization
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.parallel.tensor import apply_tensor_parallel
from titan_fp8.parallel.tensor_rules import check_tensor_parallel
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.errors import UserError


class OtherLinear(Linear):
    """A linear whose forward may be anything."""


def _decoder(vocab_size: int = 64) -> Decoder:
    dims = ModelDims(dim=32, n_layers=2, n_heads=2, ffn_dim=64, vocab_size=vocab_size, max_seq_len=8)
    with torch.device("meta"):
        return Decoder(dims)


def _problems(model: nn.Module, ranks: int = 2) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_tensor_parallel(model, ranks)
    return str(caught.value).split("\n")


def _broken_decoder() -> Decoder:
    """A decoder with one of each thing that nothing says how to divide."""
    model = _decoder(vocab_size=65)
    first, second = model.layers.values()
    with torch.device("meta"):
        first.attention.wq = Linear(32, 32)
        first.attention.gate = Linear(32, 32, bias=False)
        first.feed_forward.w1 = OtherLinear(32, 64, bias=False)
        second.attention.wk = Linear(32, 33, bias=False)
        second.extra = nn.LayerNorm(32)
    wrong = Linear(32, 32, device="meta")
    second.attention.wo = Float8Linear.from_linear(wrong, Float8Config(RECIPES["tensorwise"], emulate=True))
    return model


def test_everything_that_cannot_be_divided_is_named_with_rule_and_remedy() -> None:
    found = {line.partition(": ")[0]: line for line in _problems(_broken_decoder())}
    degree = "parallelism.tensor_parallel_degree = 2"
    expected = {
        "tok_embeddings": f"num_embeddings=65 is not a multiple of {degree}; change one of them",
        "output": f"out_features=65 is not a multiple of {degree}; change one of them",
        "layers.0.attention.wq": f"{degree} divides weights alone, and it has a bias; make it without, or set the "
        "degree to 1",
        "layers.0.attention.gate": f"{degree} divides linears by their names, wq, wk, wv, wq_b, wkv_b, w1, w3, output "
        "by output features and wo, w2 by input features, and gate is none of them; rename it, or set the degree to 1",
        "layers.0.feed_forward.w1": f"it is a {__name__}.OtherLinear, and of linears {degree} divides Linear, "
        "Float8Linear, MXFP8Linear alone, not their subclasses; use one, or set the degree to 1",
        "layers.1.attention.wk": f"out_features=33 is not a multiple of {degree}; change one of them",
        "layers.1.attention.wo": f"{degree} divides weights alone, and it has a bias; make it without, or set the "
        "degree to 1",
        "layers.1.extra": f"it is a torch.nn.modules.normalization.LayerNorm with parameters (weight, bias), and "
        f"{degree} has rules for linears, embeddings and RMSNorm alone; take them out, or set the degree to 1",
    }
    assert found == {name: f"{name}: {message}" for name, message in expected.items()}


def test_a_decoder_of_this_project_can_be_divided_and_one_rank_divides_nothing() -> None:
    check_tensor_parallel(_decoder(), 2)
    check_tensor_parallel(_broken_decoder(), 1)


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_families_with_experts_and_latent_attention_can_be_divided(family: str) -> None:
    with torch.device("meta"):
        model = Decoder(resolve_dims(family, "debugmodel", {}), seq_len=8)
    check_tensor_parallel(model, 2)


LATENT = "layers.0.attention."


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{LATENT}wq_a", (96, 64)),
        (f"{LATENT}wkv_a", (96, 64)),
        ("layers.0.moe.router.gate", (96, 64)),
        (f"{LATENT}wq_b", (48, 64)),
        (f"{LATENT}wkv_b", (48, 64)),
        (f"{LATENT}wo", (96, 32)),
        ("layers.0.moe.shared_experts.w2", (96, 32)),
        ("gate", None),
        ("layers.0.router_gate", None),
        ("layers.0.attention.a", None),
    ],
)
def test_a_rank_has_the_part_of_a_linear_that_its_name_says(name: str, part: tuple[int, int] | None) -> None:
    assert (division_problem(name, 96, 64, 2) is None) == (part is not None)
    if part is not None:
        assert local_dims(name, 96, 64, 2) == part


class OtherNorm(RMSNorm):
    """One whose forward might be another."""


def test_options_of_embeddings_and_subclasses_are_refused() -> None:
    model = _decoder()
    model.tok_embeddings = nn.Embedding(64, 32, padding_idx=0, max_norm=1.0)
    model.norm.__class__ = OtherNorm
    embedding, norm = _problems(model)
    assert embedding.startswith("tok_embeddings: it is an embedding with padding_idx, max_norm, which parallelism.")
    assert norm.startswith(f"norm: it is a {__name__}.OtherNorm with parameters (weight), and parallelism.")


def test_parameters_of_the_model_itself_are_named_too() -> None:
    model = _decoder()
    model.scale = nn.Parameter(torch.ones(1))
    (line,) = _problems(model)
    assert line.startswith("the model: it is a titan_fp8.models.decoder.Decoder with parameters (scale), and")


def test_what_cannot_be_divided_is_told_before_there_is_a_mesh_with_all_else() -> None:
    with pytest.raises(UserError) as caught:
        check_parallelization(
            _broken_decoder(),
            device_type="cpu",
            activation_checkpoint=ActivationCheckpointSection(),
            compile_config=CompileSection(),
            cpu_offload=True,
            tensor_ranks=2,
        )
    names = [line.partition(" ")[0].rstrip(":") for line in str(caught.value).split("\n")]
    assert len(names) == 9
    assert {"layers.0.attention.wq", "layers.1.extra", "training.enable_cpu_offload"} <= set(names)


def test_applying_it_to_such_a_model_changes_nothing() -> None:
    model = _broken_decoder()
    before = {name: type(module) for name, module in model.named_modules()}
    unused: dict = dict.fromkeys(("device_mesh", "shards", "tokens", "expert_mesh"))
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wq"):
        apply_tensor_parallel(model, ParallelMesh(MeshDegrees(tensor=2), **unused), loss_parallel=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
