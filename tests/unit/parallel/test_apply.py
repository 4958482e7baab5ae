"""The inner order on one rank, and materialization."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.parallel.apply import check_parallelization, materialize, parallelize
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection, ParallelismSection
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.distributed import destroy, init_distributed
from titan_fp8.parallel.fsdp import set_gradient_sync
from titan_fp8.parallel.mesh import AXES, ParallelMesh, build_mesh
from titan_fp8.runtime.config import CommSection
from titan_fp8.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParallelMesh]:
    """A world of one."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    init_distributed(CommSection(), CPU, tmp_path)
    yield build_mesh(MeshDegrees(), "cpu")
    destroy()


def _meta_decoder(tied: bool = False) -> Decoder:
    dims = ModelDims(dim=32, n_layers=2, n_heads=2, ffn_dim=64, vocab_size=50, max_seq_len=8, tied_embeddings=tied)
    with torch.device("meta"):
        return Decoder(dims)


def _parallelize(model: Decoder, mesh: ParallelMesh, cpu_offload: bool = False) -> Decoder:
    return parallelize(
        model,
        mesh=mesh,
        parallelism=ParallelismSection(),
        activation_checkpoint=ActivationCheckpointSection(mode="full"),
        compile_config=CompileSection(),
        param_dtype=torch.bfloat16,
        cpu_offload=cpu_offload,
    )


def test_one_rank_is_not_wrapped(mesh: ParallelMesh) -> None:
    model = _meta_decoder()
    assert _parallelize(model, mesh) is model
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert all(parameter.is_meta for parameter in model.parameters())
    set_gradient_sync(model, mesh, is_last_microbatch=False)  # nothing to synchronize, nothing to refuse


def test_the_mesh_of_one_rank_has_the_axes_of_every_mesh(mesh: ParallelMesh) -> None:
    assert mesh.device_mesh.mesh_dim_names == AXES
    assert (mesh.data_rank, mesh.data_ranks, mesh.world_size) == (0, 1, 1)


def test_cpu_offload_on_a_cpu_is_refused(mesh: ParallelMesh) -> None:
    with pytest.raises(UserError, match=r"training\.enable_cpu_offload moves .* already are; turn it off"):
        _parallelize(_meta_decoder(), mesh, cpu_offload=True)


def test_all_that_cannot_be_done_is_said_at_once_without_a_mesh() -> None:
    with pytest.raises(UserError) as error:
        check_parallelization(
            _meta_decoder(),
            device_type="cpu",
            activation_checkpoint=ActivationCheckpointSection(selective_ac_option="op", debug=True),
            compile_config=CompileSection(enable=True, backend="inducter"),
            cpu_offload=True,
            async_tensor_parallel=True,
            fsdp_exchange="peer_memory",
        )
    lines = str(error.value).split("\n")
    assert [line.partition(" ")[0] for line in lines] == [
        "activation_checkpoint.debug",
        "compile.backend",
        "training.enable_cpu_offload",
        "parallelism.enable_async_tensor_parallel",
        "parallelism.fsdp_exchange",
    ]


def test_the_defaults_pass_the_check() -> None:
    check_parallelization(
        _meta_decoder(),
        device_type="cpu",
        activation_checkpoint=ActivationCheckpointSection(),
        compile_config=CompileSection(),
        cpu_offload=False,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_materialized_parameters_are_on_the_device_and_tied_ones_stay_tied(tied: bool) -> None:
    model = _meta_decoder(tied)
    materialize(model, CPU)
    assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {CPU}
    assert (model.output.weight is model.tok_embeddings.weight) is tied


def test_parameters_tied_in_any_module_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    model[1][0].weight = model[0].weight
    materialize(model, CPU)
    assert model[1][0].weight is model[0].weight
    assert model[1][0].bias is not model[0].bias


def test_values_that_are_there_already_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    weight = model[0].weight.detach().clone()
    materialize(model, CPU)
    assert torch.equal(model[0].weight, weight)
    assert not model[1].weight.is_meta
