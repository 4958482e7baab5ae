"""`[parallelism]`, `[activation_checkpoint]`, `[compile]` and `[fault_tolerance]`: how the model is spread and run.

The product of all degrees is the number of processes (WORLD_SIZE); one degree may be -1 and is then inferred.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator

from titan_fp8.config.section import CountOrAuto, Problem, Section, key, not_supported_yet


class ParallelismSection(Section):
    """How parameters, activations and data are spread over ranks."""

    data_parallel_replicate_degree: CountOrAuto = key(1, unit="ranks")
    """Copies of the model. With a shard degree of 1 this is DDP, with a larger one HSDP."""

    data_parallel_shard_degree: CountOrAuto = key(-1, unit="ranks")
    """Ranks over which one copy of the parameters is sharded (FSDP2). -1 means all that the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a block's gathered parameters are freed after its forward pass and gathered again for the backward pass:
    `always`, `never`, or `default` (always, without pipeline parallelism)."""

    fsdp_exchange: Literal["auto", "collectives", "peer_memory"] = "auto"
    """How weights and gradients of the blocks and the output layer move between the ranks of one copy: by
    `collectives`, kernels that share the GPU with the computation; by `peer_memory`, copies between the GPUs of one
    host that share nothing but the memory's bandwidth, with sums in `training.mixed_precision_reduce`; or by what is
    possible, `auto`."""

    tensor_parallel_degree: CountOrAuto = key(1, unit="ranks")
    """Ranks over which each matrix product is split, and between products the tokens (sequence parallel)."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits before the loss instead of computing it on their shards."""

    enable_async_tensor_parallel: bool = False
    """Overlap the exchanges of tensor parallelism with the matrix products beside them. Needs `compile.enable` and GPUs
    that can read each other's memory."""

    pipeline_parallel_degree: CountOrAuto = key(1, unit="stages")
    """Ranks over which the layers are split."""

    module_fqns_per_model_part: list[list[str]] | None = None
    """Names of the modules in each pipeline stage, in the model's order. Unset means an even split."""

    pipeline_parallel_first_stage_less_layers: int = key(1, ge=0, unit="layers")
    """Layers that the first stage holds less, as it also holds the embedding."""

    pipeline_parallel_last_stage_less_layers: int = key(1, ge=0, unit="layers")
    """Layers that the last stage holds less, as it also holds the output projection."""

    pipeline_parallel_layers_per_stage: int | None = key(None, ge=1, unit="layers")
    """Layers of one pipeline stage. Unset means one or two stages a rank, as the schedule wants."""

    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule: `1F1B`, `GPipe`, `Interleaved1F1B`, `LoopedBFS`, `InterleavedZeroBubble`, `ZBVZeroBubble` or
    `DualPipeV`."""

    pipeline_parallel_schedule_csv: str | None = ""
    """File with a custom pipeline schedule, in place of one by name: for each rank a line of actions."""

    pipeline_parallel_microbatch_size: int = key(1, ge=1, unit="sequences")
    """Sequences in one pipeline microbatch."""

    pipeline_parallel_expert_parallel_overlap: bool = True
    """With `DualPipeV` and `expert_parallel_degree` > 1: the forward and backward passes that the schedule pairs take
    turns, so that the tokens of one microbatch travel while another one is computed with. Other schedules have no such
    pairs, and experts that are not dealt out exchange nothing: there it changes nothing."""

    context_parallel_degree: CountOrAuto = key(1, unit="ranks")
    """Ranks over which each sequence is split."""

    context_parallel_load_balancer: str | None = "headtail"
    """How a sequence's parts are dealt out to ranks: `headtail` gives each a part of the head and one of the tail,
    which evens out the cost of causal attention; unset, each gets one piece."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel between the ranks of one sequence: `allgather` collects all at once, `alltoall` passes
    one rank's at a time around, in less memory."""

    expert_parallel_degree: int = key(1, ge=1, unit="ranks")
    """Ranks over which the experts of a layer are dealt out. They are taken from `data_parallel_shard_degree`,
    `context_parallel_degree` and, where `expert_tensor_parallel_degree` is 1, `tensor_parallel_degree`, whose product
    is a multiple of it."""

    expert_tensor_parallel_degree: int = key(1, ge=1, unit="ranks")
    """Ranks over which the hidden features of each expert are divided: 1, or `tensor_parallel_degree`. With 1 experts
    are whole, and each rank of tensor parallelism routes tokens of its own."""

    expert_parallel_overlap_batches: int = key(1, ge=1, unit="parts")
    """Parts of a local batch that take turns in layers with experts, so that the tokens of one travel while another one
    is computed with. It divides `training.local_batch_size`, in a pipeline
    `pipeline_parallel_microbatch_size`; a batch of validation that it does not divide is taken whole. 1: only shared
    experts are computed meanwhile."""

    expert_parallel_payload: Literal["activations", "float8", "mxfp8"] = "activations"
    """As what tokens travel to their experts, and the gradients of the experts' outputs: as they are, or in half the
    bytes, as `float8` codes with a scale for each token, or as `mxfp8` codes with one for 32 of its values. What comes
    back from experts travels as it is."""

    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """Implementation of the exchange of tokens between experts: `standard` is all-to-all by the process group.
    `deepep` is refused, also where the package of that name is installed: it is not supported yet."""


class ActivationCheckpointSection(Section):
    """Which activations are recomputed in the backward pass instead of kept."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
    """`none` keeps all, `full` recomputes whole blocks, `selective` recomputes by layer or by operation, and
    `memory_budget` lets the compiler choose."""

    selective_ac_option: str = key("2", only_with={"mode": ["selective"]}, parked_by=("none", "full", "memory_budget"))
    """With `selective`: a number n recomputes the first and then every n-th block, the last one aside unless n is 1;
    `op` recomputes in every block all but the results of expensive operations."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = key(
        ["moe.router.gate"], only_with={"selective_ac_option": ["op"]}
    )
    """With `selective` and `op`: linears with the weight shapes of these modules are recomputed all the same."""

    early_stop: bool = key(False, only_with={"mode": ["full", "selective"]})
    """Stop recomputing a block when all that the backward pass needs is there."""

    memory_budget: float = key(0.5, ge=0, le=1, only_with={"mode": ["memory_budget"]})
    """With `memory_budget`: share of the activations to keep, from 0 (as `full`) to 1 (as `none`). Needs
    `compile.enable`."""

    visualize_memory_budget_pareto: bool = key(False, only_with={"mode": ["memory_budget"]})
    """With `memory_budget`: write a picture of memory against recomputation time into the run's folder."""

    preserve_rng_state: bool = key(True, only_with={"mode": ["full", "selective"]})
    """Recompute with the random state of the first pass, for models with random layers."""

    determinism_check: Literal["default", "none"] = key("default", only_with={"mode": ["full", "selective"]})
    """Compare shapes and types of recomputed tensors with those of the first pass."""

    debug: bool = key(False, only_with={"mode": ["full", "selective"]})
    """Explain in detail when recomputation differs from the first pass. Slow."""

    @field_validator("selective_ac_option")
    @classmethod
    def _is_op_or_a_number(cls, value: str) -> str:
        if value != "op" and not (value.isascii() and value.isdecimal() and int(value) >= 1):
            raise ValueError('expected "op" or a number of layers such as "2"')
        return value


class CompileSection(Section):
    """`torch.compile`."""

    switch = "enable"

    enable: bool = False
    """Compile the components below."""

    components: list[Literal["model", "loss"]] = key(["model", "loss"])
    """What to compile: `model` (each transformer block by itself) and `loss`."""

    backend: str = key("inductor", min_length=1)
    """Compiler backend of `torch.compile`."""

    def problems(self) -> Iterator[Problem]:
        """Enabled means that something is compiled."""
        if self.enable and not self.components:
            yield Problem("components", 'leaves nothing to compile; name "model" or "loss", or turn compile.enable off')


class FaultToleranceSection(Section):
    """Replicas that may come and go during the training."""

    enable: bool = not_supported_yet(False)
    """Let replicas of the model fail and rejoin."""

    process_group: str = not_supported_yet("gloo")
    """Communication backend between replicas."""

    process_group_timeout_ms: int = not_supported_yet(10000, ge=1, unit="ms")
    """Timeout of the communication between replicas."""

    replica_id: int = not_supported_yet(0, ge=0)
    """Number of this replica."""

    group_size: int = not_supported_yet(0, ge=0, unit="replicas")
    """Number of replicas."""

    min_replica_size: int = not_supported_yet(1, ge=1, unit="replicas")
    """Fewest replicas with which a step may run."""

    semi_sync_method: str | None = not_supported_yet(None)
    """Method of training with rare synchronization between replicas."""
