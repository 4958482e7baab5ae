"""Initial weights: their distributions, and that no mesh changes them.

Meshes are those of a fake process group: the shapes, offsets and wrappers of every rank without its processes, which is
enough because initialization communicates nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_fp8.models import initialization
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import Normal, TruncatedNormal, initialize

DIMS = ModelDims(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, ffn_dim=80, max_seq_len=16)


@pytest.fixture(autouse=True)
def _several_blocks_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "_BLOCK_ELEMENTS", 1000)


@contextmanager
def _fake_world(rank: int, *mesh_shape: int) -> Iterator[DeviceMesh]:
    """This process as `rank` of a mesh of the given shape."""
    # DTensor caches results by mesh, so the meshes of different ranks in this one process must not compare equal.
    names = (f"outer_{rank}", f"inner_{rank}")[-len(mesh_shape) :]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(mesh_shape).numel())
    try:
        yield init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def _on_meta(dims: ModelDims = DIMS) -> Decoder:
    with torch.device("meta"):
        return Decoder(dims)


def _shard_blocks_and_root(model: Decoder, mesh: DeviceMesh) -> None:
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _initialized(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    """The process's part of every parameter after materialization."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.fill_(float("nan"))  # what initialization leaves out is seen
    initialize(model, seed)
    return {
        initialization.clean_fqn(name): (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.fixture
def whole() -> dict[str, Tensor]:
    return _initialized(_on_meta())


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])  # with 7, wk's 24 rows are uneven; 101 rows always
def test_shards_of_any_world_size_are_slices_of_the_whole(world_size: int, whole: dict[str, Tensor]) -> None:
    shards = []
    for rank in range(world_size):
        with _fake_world(rank, world_size) as mesh:
            model = _on_meta()
            _shard_blocks_and_root(model, mesh)
            shards.append(_initialized(model))
    for name, expected in whole.items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), expected), name


def test_empty_shards_are_ordinary(whole: dict[str, Tensor]) -> None:
    dims = replace(DIMS, dim=16, n_heads=2, n_kv_heads=1)  # 8 rows of wk over 9 ranks
    with _fake_world(8, 9) as mesh:
        model = _on_meta(dims)
        _shard_blocks_and_root(model, mesh)
        assert _initialized(model)["layers.0.attention.wk.weight"].numel() == 0


def test_replicas_of_a_hybrid_mesh_hold_the_same_slices(whole: dict[str, Tensor]) -> None:
    for rank in range(4):
        with _fake_world(rank, 2, 2) as mesh:
            model = _on_meta()
            _shard_blocks_and_root(model, mesh)
            for name, local in _initialized(model).items():
                assert torch.equal(local, whole[name].chunk(2)[rank % 2]), name


def test_tensor_parallel_shards_are_slices_of_the_whole(whole: dict[str, Tensor]) -> None:
    plan = {"feed_forward.w1": ColwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    for rank in range(4):
        data, tensor = divmod(rank, 2)
        with _fake_world(rank, 2, 2) as mesh:
            model = _on_meta()
            for block in model.layers.values():
                parallelize_module(block, mesh[f"inner_{rank}"], plan)
                fully_shard(block, mesh=mesh[f"outer_{rank}"])
            parts = _initialized(model)
            w1, w2 = "layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w2.weight"
            assert torch.equal(parts[w1], whole[w1].chunk(2, dim=0)[tensor].chunk(2, dim=0)[data])
            assert torch.equal(parts[w2], whole[w2].chunk(2, dim=1)[tensor].chunk(2, dim=0)[data])


def test_uneven_column_shards_are_slices_of_the_whole() -> None:
    class Table(nn.Module):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def init_rules(self) -> dict[str, Normal]:
            return {"weight": Normal(1.0)}

    table = Table(torch.empty(60, 40))
    initialize(table, 3)
    for rank, expected in enumerate(table.weight.detach().chunk(3, dim=1)):
        with _fake_world(rank, 3) as mesh:
            shape, stride = table.weight.shape, table.weight.stride()
            local = DTensor.from_local(torch.empty_like(expected), mesh, [Shard(1)], shape=shape, stride=stride)
            part = Table(local)
            initialize(part, 3)
            assert torch.equal(part.weight.detach().to_local(), expected)


def test_pending_sums_and_meta_parameters_and_unknown_parameters_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"tok_embeddings\.weight is on the meta device"):
        initialize(_on_meta(), 0)
    model = Decoder(DIMS)
    model.norm.bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(RuntimeError, match=r"no initialization rule covers norm\.bias"):
        initialize(model, 0)
    model = Decoder(DIMS)
    with _fake_world(0, 2) as mesh:
        model.output.weight = nn.Parameter(DTensor.from_local(torch.zeros(101, 48), mesh, [Partial()]))
        with pytest.raises(RuntimeError, match=r"output\.weight is a pending sum"):
            initialize(model, 0)


def test_wrappers_converted_linears_and_dtype_do_not_change_the_draw(whole: dict[str, Tensor]) -> None:
    class Converted(nn.Linear):
        pass

    model = _on_meta()
    with torch.device("meta"):
        model.layers["0"].attention.wq = Converted(48, 48, bias=False)
    model.layers["1"] = checkpoint_wrapper(model.layers["1"])
    for name, tensor in _initialized(model).items():
        assert torch.equal(tensor, whole[name]), name
    for name, tensor in _initialized(_on_meta().to(torch.bfloat16)).items():
        assert torch.equal(tensor, whole[name].bfloat16()), name


def test_seeds_names_and_blocks_are_independent(whole: dict[str, Tensor]) -> None:
    assert not torch.equal(_initialized(_on_meta(), seed=8)["output.weight"], whole["output.weight"])
    draws = [whole["layers.0.attention.wq.weight"], whole["layers.1.attention.wq.weight"]]
    blocks = [block.flatten() for draw in draws for block in (draw[:20], draw[20:40])]  # 1000 // 48 = 20 rows a block
    correlation = torch.corrcoef(torch.stack(blocks)) - torch.eye(4)
    assert correlation.abs().max() < 0.15


def test_initialization_leaves_the_global_generator_alone() -> None:
    model, state = Decoder(DIMS), torch.get_rng_state()
    initialize(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_standard_deviations_are_the_documented_ones() -> None:
    dims = replace(DIMS, dim=256, ffn_dim=256, vocab_size=512)
    weights = _initialized(_on_meta(dims))
    residual = {0: 0.02 / 2**0.5, 1: 0.02 / 4**0.5}
    expected = {"tok_embeddings": 1.0, "output": 1 / 16, "norm": 0.0}
    for layer, std in residual.items():
        expected |= {f"layers.{layer}.attention.{w}": 0.02 for w in ("wq", "wk", "wv")}
        expected |= {f"layers.{layer}.{w}": std for w in ("attention.wo", "feed_forward.w2", "feed_forward.w3")}
        expected |= {f"layers.{layer}.feed_forward.w1": 0.02}
        expected |= {f"layers.{layer}.{norm}": 0.0 for norm in ("attention_norm", "ffn_norm")}
    assert {f"{name}.weight" for name in expected} == set(weights)
    for name, std in expected.items():
        weight = weights[f"{name}.weight"]
        if std == 0.0:
            assert (weight == 1.0).all(), name
            continue
        bounded = name != "tok_embeddings"  # a cut at three sigma takes 1.3 % off the standard deviation
        assert weight.std().item() == pytest.approx(std * (0.9866 if bounded else 1.0), rel=0.02), name
        assert abs(weight.mean().item()) < 0.03 * std, name
        assert (weight.abs().max() <= 3.0001 * std).item() is bounded, name


def test_truncated_normal_is_a_normal_within_its_bounds() -> None:
    sample = torch.empty(200_000)
    TruncatedNormal(2.0, bound=1.0).fill(sample, torch.Generator().manual_seed(0))
    assert sample.abs().max() <= 2.0
    inner = (sample.abs() < 1.0).float().mean().item()  # P(|z| < 0.5) / P(|z| < 1)
    assert inner == pytest.approx(0.38292 / 0.68269, abs=0.005)


def test_a_tied_embedding_starts_as_the_output_head() -> None:
    weights = _initialized(_on_meta(replace(DIMS, tied_embeddings=True)))
    assert "output.weight" not in weights
    assert weights["tok_embeddings.weight"].std().item() == pytest.approx(48**-0.5, rel=0.05)


def test_tied_embeddings_survive_sharding_and_materialization() -> None:
    for rank in range(2):
        with _fake_world(rank, 2) as mesh:
            model = _on_meta(replace(DIMS, tied_embeddings=True))
            _shard_blocks_and_root(model, mesh)
            _initialized(model)
            assert isinstance(model.output.weight, DTensor)
            assert model.output.weight is model.tok_embeddings.weight
            assert torch.isfinite(model.output.weight.to_local()).all()
