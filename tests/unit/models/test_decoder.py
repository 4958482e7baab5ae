"""The decoder as a module: names, dtypes, causality, tying, compilation."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.linear import Linear
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.runtime.errors import UserError

DIMS = ModelDims(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, max_seq_len=64, rope_scaling_factor=8.0)
NAMES = {
    "tok_embeddings.weight",
    *(
        f"layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")),
            *(f"feed_forward.{w}" for w in ("w1", "w2", "w3")),
            "attention_norm",
            "ffn_norm",
        )
    ),
    "norm.weight",
    "output.weight",
}

# Dynamo looks at .grad of a compiled region's inputs and hides the warning in a way that an error filter overrules.
hides_dynamo_warning = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


def _tokens(rows: int = 2, length: int = 33, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, DIMS.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def _decoder(dims: ModelDims = DIMS, **options) -> Decoder:
    model = Decoder(dims, **options)
    initialize(model, seed=0)
    return model


def _loss_and_gradients(model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = cross_entropy_sum(model(*inputs), inputs[0].roll(-1, 1))
    loss.backward()
    return loss.detach(), {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()
    }


def test_state_dict_has_the_names_of_the_field_and_nothing_else() -> None:
    assert set(_decoder().state_dict()) == NAMES


def test_logits_of_a_position_do_not_depend_on_later_tokens() -> None:
    model, tokens = _decoder(), _tokens()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % DIMS.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_initial_loss_is_near_the_entropy_of_a_uniform_guess() -> None:
    tokens = _tokens(8, 64)
    per_token = cross_entropy_sum(_decoder()(tokens), tokens.roll(-1, 1)) / tokens.numel()
    assert 4.4 < per_token < 5.6  # log(101) = 4.6, plus about half the logits' variance of 1


def test_compute_dtype_is_that_of_every_activation_and_parameters_keep_theirs() -> None:
    model = _decoder(compute_dtype=torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if not list(module.children()) and name not in ("tok_embeddings", "rope"):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.dtype}))
    loss, gradients = _loss_and_gradients(model, _tokens())
    assert len(seen) == len(NAMES) - 1
    assert set(seen.values()) == {torch.bfloat16}
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    reference, _ = _loss_and_gradients(_decoder(), _tokens())
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=0)
    assert loss != reference


def test_linear_casts_weight_and_bias_to_the_input() -> None:
    layer = Linear(8, 4)
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))


@hides_dynamo_warning
@pytest.mark.parametrize("backend", ["math", "flash"])
@pytest.mark.parametrize("document_masking", [False, True])
def test_compiled_and_checkpointed_blocks_break_no_graph_and_equal_eager(backend: str, document_masking: bool) -> None:
    options = {"attention_backend": backend, "document_masking": document_masking, "compute_dtype": torch.bfloat16}
    inputs = (_tokens(), *((torch.arange(33).div(8).int().expand(2, 33),) if document_masking else ()))
    expected_loss, expected = _loss_and_gradients(_decoder(**options), *inputs)
    model = _decoder(**options)
    for key, block in model.layers.items():
        model.layers[key] = checkpoint_wrapper(block)
        model.layers[key].compile(backend="aot_eager", fullgraph=True)
    loss, gradients = _loss_and_gradients(model, *inputs)
    assert loss == expected_loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-3, msg=name)


@hides_dynamo_warning
def test_blocks_of_different_depth_share_one_compiled_graph() -> None:
    torch.compiler.reset()
    compiler = CompileCounter()
    model = _decoder()
    for block in model.layers.values():
        block.compile(backend=compiler, fullgraph=True)
    model(_tokens())
    assert compiler.frame_count == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        model(_tokens(seed=1))


def test_tied_head_is_the_embedding_also_after_materialization_and_casts() -> None:
    dims = replace(DIMS, tied_embeddings=True)
    with torch.device("meta"):
        model = Decoder(dims)
    assert model.output.weight is model.tok_embeddings.weight
    model.to_empty(device="cpu")
    initialize(model, seed=0)
    assert model.output.weight is model.tok_embeddings.weight
    assert len(list(model.parameters())) == len(NAMES) - 1
    _, gradients = _loss_and_gradients(model, _tokens())
    untied = Decoder(DIMS)
    untied.load_state_dict(model.state_dict())
    _, expected = _loss_and_gradients(untied, _tokens())
    torch.testing.assert_close(
        gradients["tok_embeddings.weight"], expected["tok_embeddings.weight"] + expected["output.weight"]
    )
    assert model.to(torch.bfloat16).output.weight is model.tok_embeddings.weight


def test_rope_tables_reach_sharded_blocks_in_float32_although_fsdp_casts_inputs() -> None:
    expected = _decoder(compute_dtype=torch.bfloat16)(_tokens())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _decoder(compute_dtype=torch.bfloat16)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for block in model.layers.values():
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        assert torch.equal(model(_tokens()), expected)
    finally:
        dist.destroy_process_group()


def test_the_model_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder(DIMS)
        logits = model(torch.zeros(2, 16, dtype=torch.long))
    assert logits.shape == (2, 16, DIMS.vocab_size)


def test_longer_sequences_than_the_model_has_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"training\.seq_len = 65 is longer than the model's 64 positions"):
        Decoder(DIMS, seq_len=65)
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16 positions"):
        Decoder(DIMS, seq_len=16)(_tokens(length=17))


def test_document_ids_are_refused_by_a_model_built_without_masking() -> None:
    with pytest.raises(ValueError, match="document_masking=False"):
        _decoder()(_tokens(), torch.zeros(2, 33, dtype=torch.int32))
