"""Rules of what only some families of models have: experts and latent attention.

They are among those of `job_rules.py`, which has them in its list and gives them the model's dimensions.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from titan_fp8.config.section import Problem
from titan_fp8.models.dims import ModelDims
from titan_fp8.parallel.degrees import MeshDegrees

MX_BLOCK = 32
"""Values that share a scale in MXFP8."""

if TYPE_CHECKING:
    from titan_fp8.job_config import JobConfig


def experts_exist(job: "JobConfig", dims: ModelDims) -> Iterator[Problem]:
    """Nothing is routed in a dense model."""
    if job.debug.moe_force_load_balance and dims.n_experts is None:
        yield Problem("debug.moe_force_load_balance", f"{job.model.name} has no experts to balance; leave it at false")


def routers_learn(job: "JobConfig", dims: ModelDims) -> Iterator[Problem]:
    """A score that is divided by itself is 1 whatever the router says, and has no gradient."""
    if dims.n_experts is not None and dims.top_k == 1 and dims.router_norm and dims.aux_loss_weight == 0:
        yield Problem(
            "model.overrides",
            "router_norm = true with top_k = 1 divides every score by itself, and with aux_loss_weight = 0 nothing "
            "else trains the router; set router_norm to false, or raise top_k or aux_loss_weight",
            is_sentence=True,
        )


def experts_are_dealt_out(job: "JobConfig", dims: ModelDims, degrees: MeshDegrees) -> Iterator[Problem]:
    """Every rank of expert parallelism has as many experts."""
    key, ranks = "parallelism.expert_parallel_degree", job.parallelism.expert_parallel_degree
    if job.parallelism.expert_parallel_comm_backend == "deepep":
        package = "though its package deep_ep is" if find_spec("deep_ep") else "and its package deep_ep is not"
        yield Problem(
            "parallelism.expert_parallel_comm_backend",
            f"not supported yet, {package} installed: tokens travel by the process group's all-to-all alone; set it "
            'to "standard"',
        )
    if ranks == 1:
        yield from _nothing_is_exchanged(job)
        return
    if dims.n_experts is None:
        yield Problem(key, f"{job.model.name} has no experts to deal out; set it to 1")
    elif dims.n_experts % ranks:
        yield Problem(key, f"{ranks} ranks do not divide the {dims.n_experts} experts; choose a divisor")
    if job.parallelism.expert_parallel_payload == "mxfp8" and dims.dim % MX_BLOCK:
        yield Problem(
            "parallelism.expert_parallel_payload",
            f"cuts a token's {dims.dim} values into blocks of {MX_BLOCK}; change model.overrides.dim, or set it to "
            '"float8"',
        )


def budget_reaches_experts(job: "JobConfig", dims: ModelDims, degrees: MeshDegrees) -> Iterator[Problem]:
    """The compiler has in one piece what it shall keep a share of."""
    if job.activation_checkpoint.mode == "memory_budget" and dims.n_experts is not None:
        for axis, ranks in (("expert", degrees.expert), ("tensor", degrees.tensor)):
            if ranks > 1:
                yield Problem(
                    "activation_checkpoint.mode",
                    f'"memory_budget" is for what the compiler compiles whole, and experts stay outside of that with '
                    f'parallelism.{axis}_parallel_degree = {ranks}; set it to "full", or to "selective" with '
                    'activation_checkpoint.selective_ac_option = "op"',
                )


def _nothing_is_exchanged(job: "JobConfig") -> Iterator[Problem]:
    """What is about the exchange of tokens needs one."""
    parallelism, without = job.parallelism, "parallelism.expert_parallel_degree = 1 exchanges no tokens"
    if parallelism.expert_parallel_overlap_batches > 1:
        yield Problem("parallelism.expert_parallel_overlap_batches", f"{without} to overlap with; set it to 1")
    if parallelism.expert_parallel_payload != "activations":
        yield Problem("parallelism.expert_parallel_payload", f'{without}; set it to "activations"')


def batches_are_parted(job: "JobConfig", dims: ModelDims, degrees: MeshDegrees) -> Iterator[Problem]:
    """Parts of a batch that take turns are sequences of it, equally many."""
    key, parts = "parallelism.expert_parallel_overlap_batches", job.parallelism.expert_parallel_overlap_batches
    if parts == 1:
        return
    size, name = job.training.local_batch_size, "training.local_batch_size"
    if degrees.pipeline > 1:
        size, name = job.parallelism.pipeline_parallel_microbatch_size, "parallelism.pipeline_parallel_microbatch_size"
    if size % parts:
        yield Problem(key, f"{parts} parts do not divide {name} = {size}; change one of them")
    if degrees.tensor > 1:
        yield Problem(
            key,
            f"parallelism.tensor_parallel_degree = {degrees.tensor} cuts a batch along all its tokens, so that it "
            "cannot be parted by sequences; set one of them to 1",
        )
    if job.training.document_masking:
        yield Problem(key, "training.document_masking makes one mask for a whole batch; turn it off, or set this to 1")
    section = job.activation_checkpoint
    if section.mode == "selective" and section.selective_ac_option == "op":
        yield Problem(
            key,
            'parts of a batch cross each other in a layer, which activation_checkpoint.selective_ac_option = "op" '
            'cannot take apart; use mode = "full", "none", or selective by every n-th layer',
        )


def experts_divide(job: "JobConfig", dims: ModelDims, degrees: MeshDegrees) -> Iterator[Problem]:
    """Every rank of tensor parallelism has as many hidden features of the shared experts, and of each expert if these
    are divided."""
    key, ranks = "parallelism.expert_tensor_parallel_degree", degrees.expert_tensor
    if dims.n_experts is None:
        if ranks > 1:
            yield Problem(key, f"{job.model.name} has no experts to divide; set it to 1")
        return
    hidden = dims.expert_hidden_dim
    if hidden % ranks:
        yield Problem(key, f"{ranks} ranks do not divide an expert's hidden features, {hidden}; set it to 1")
    shared = dims.n_shared_experts * hidden
    if shared % degrees.tensor:
        yield Problem(
            "parallelism.tensor_parallel_degree",
            f"{degrees.tensor} ranks do not divide the hidden features of the shared experts, {shared}; choose a "
            "divisor",
        )
