"""Every rule that spans two sections, and every rule that looks outside the configuration (files, WORLD_SIZE).

Each rule is a function of the job and the number of processes that yields what is broken. A combination that would do
nothing, or something else than it says, is refused: what is asked for and cannot be done is an error with its remedy.
Rules within one section stand with the section (`problems`), and rules that need the model are asked later, on the meta
device.

Nothing here imports torch, so that a mistake is answered at once.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_fp8.config.section import Problem
from titan_fp8.converters.config import CONVERTERS
from titan_fp8.data.dataset_spec import DatasetSpec, training_spec, validation_spec
from titan_fp8.family_rules import (
    batches_are_parted,
    budget_reaches_experts,
    experts_are_dealt_out,
    experts_divide,
    experts_exist,
    routers_learn,
)
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.effect import without_effect
from titan_fp8.models.families import FLAVORS
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.parallel.context_rules import check_load_balancer, check_rotate_method, check_sequence
from titan_fp8.parallel.degrees import MeshDegrees, given_degrees, resolve_degrees
from titan_fp8.parallel.pipeline_split import check_pipeline
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

if TYPE_CHECKING:
    from titan_fp8.job_config import JobConfig

_BEGINS_WITH_KEY = re.compile(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?: |$)")


def degrees_fit_the_processes(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """The product of the degrees is WORLD_SIZE."""
    try:
        resolve_degrees(job.parallelism, world_size)
    except UserError as error:
        yield Problem("parallelism", str(error))


def batches_divide(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """A step's sequences are a whole number of microbatches a rank."""
    training = job.training
    degrees = _degrees(job, world_size)
    if training.global_batch_size == -1 or degrees is None:
        return
    unit = training.local_batch_size * degrees.data_parallel
    if training.global_batch_size % unit:
        below = training.global_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        yield Problem(
            "training.global_batch_size",
            f"not a multiple of training.local_batch_size {training.local_batch_size} x {degrees.data_parallel} "
            f"data-parallel ranks = {unit}; take {near}, or change local_batch_size",
        )


def early_steps_see_whole_gradients(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """An update in the backward pass sees neither the norm of all gradients nor a later microbatch."""
    key = "optimizer.early_step_in_backward"
    if not job.optimizer.early_step_in_backward:
        return
    if job.training.max_norm != 0:
        yield Problem(key, "gradients are gone before they can be clipped; set training.max_norm = 0")
    if job.training.nonfinite_policy == "skip":
        yield Problem(key, 'a step cannot be skipped once it is taken; set training.nonfinite_policy = "stop"')
    degrees = _degrees(job, world_size)
    if degrees is None or job.training.global_batch_size == -1:
        return
    unit = job.training.local_batch_size * degrees.data_parallel
    if job.training.global_batch_size > unit:
        yield Problem(key, f"allows no gradient accumulation; set training.global_batch_size = {unit} or -1")


def schedule_covers_the_training(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Steps past the end of the schedule learn something."""
    schedule = job.lr_scheduler
    total = schedule.total_steps
    if total is not None and total < job.training.steps and schedule.min_lr_factor == 0 and schedule.decay_ratio != 0:
        yield Problem(
            "lr_scheduler.total_steps",
            f"the learning rate is 0 for the last {job.training.steps - total} of {job.training.steps} training.steps; "
            "raise total_steps, lower training.steps, or set lr_scheduler.min_lr_factor",
        )


def model_exists(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Family and flavor are known, the overridden dimensions fit together, and the sequences fit into the model."""
    model = job.model
    if model.name not in FLAVORS:
        yield Problem("model.name", f"not one of {', '.join(FLAVORS)}{did_you_mean(model.name, FLAVORS)}")
        return
    flavors = FLAVORS[model.name]
    if model.flavor not in flavors:
        hint = did_you_mean(model.flavor, flavors)
        yield Problem("model.flavor", f"not a flavor of {model.name}, which has {', '.join(flavors)}{hint}")
        return
    dims: list[ModelDims] = []
    overrides = model.overrides.given()
    yield from _domain_problems(
        "model.overrides", lambda: dims.append(resolve_dims(model.name, model.flavor, overrides))
    )
    if dims:
        for name, text in without_effect(flavors[model.flavor], dims[0], overrides):
            yield Problem(f"model.overrides.{name}", text)
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable:
        lengths["validation.seq_len"] = job.validation.seq_len
    for key, seq_len in lengths.items():
        if dims and seq_len > dims[0].max_seq_len:
            remedy = "shorten it or raise model.overrides.max_seq_len"
            yield Problem(key, f"is longer than the model's {dims[0].max_seq_len} positions; {remedy}")


def converters_exist(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Each converter is known and named once."""
    key, names = "model.converters", job.model.converters
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Problem(key, f"{name} is named twice; take one out")
        if name not in CONVERTERS:
            yield Problem(key, f"{name} is not one of {', '.join(CONVERTERS)}{did_you_mean(name, CONVERTERS)}")
    if job.model.print_after_conversion and not names:
        yield Problem("model.print_after_conversion", "has no effect without a converter in model.converters")


def parameters_hold_their_gradients(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Autograd rounds a gradient to the dtype of its parameter."""
    dtype = job.training.dtype
    if job.quantize.linear.float8.grad_weight_dtype == "float32" and dtype != "float32":
        yield Problem(
            "quantize.linear.float8.grad_weight_dtype",
            f'has no effect with training.dtype = "{dtype}", which gradients are rounded to; leave one of them out',
        )


def sharded_features_have_shards(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """What FSDP does needs more than one shard."""
    degrees = _degrees(job, world_size)
    if degrees is None:
        return
    if job.training.mixed_precision_reduce != "float32" and degrees.shards == degrees.data_parallel_replicate == 1:
        yield Problem(
            "training.mixed_precision_reduce",
            "no gradients are summed over data-parallel ranks; leave it out, or raise "
            "parallelism.data_parallel_shard_degree",
        )
    if job.parallelism.fsdp_exchange == "peer_memory":
        key = "parallelism.fsdp_exchange"
        if degrees.shards == 1:
            yield Problem(key, "nothing is sharded, so nothing is exchanged; leave it out")
        if degrees.pipeline > 1:
            yield Problem(
                key, "a pipeline gathers more blocks at a time than there are buffers in peer memory; leave it out"
            )
    float8, section = job.quantize.linear.float8, "quantize.linear.float8"
    gathered = {
        f"{section}.enable_fsdp_float8_all_gather": float8.enable_fsdp_float8_all_gather,
        "quantize.linear.mx.enable_fsdp_mxfp8_all_gather": job.quantize.linear.mx.enable_fsdp_mxfp8_all_gather,
    }
    if degrees.shards == degrees.expert_shards == 1:
        of_experts = job.quantize.grouped_mm.mx.enable_fsdp_mxfp8_all_gather
        gathered["quantize.grouped_mm.mx.enable_fsdp_mxfp8_all_gather"] = of_experts
    for key, is_gathered in gathered.items() if degrees.shards == 1 else ():
        if is_gathered:
            remedy = (
                "start two processes (NGPU=2)" if world_size == 1 else "raise parallelism.data_parallel_shard_degree"
            )
            yield Problem(key, f"nothing is sharded, so nothing is gathered; {remedy}")
    keeps_gathered = job.parallelism.fsdp_reshard_after_forward == "never" and degrees.shards > 1
    if float8.force_recompute_fp8_weight_in_bwd and float8.enable_fsdp_float8_all_gather and keeps_gathered:
        yield Problem(
            f"{section}.force_recompute_fp8_weight_in_bwd",
            'parallelism.fsdp_reshard_after_forward = "never" keeps the gathered FP8 weights for the backward pass; '
            "leave one of the two out",
        )
    if job.training.enable_cpu_offload and degrees.shards == 1 and world_size > 1:
        yield Problem(
            "training.enable_cpu_offload",
            "only sharded parameters are offloaded, and parallelism.data_parallel_shard_degree is 1; raise it",
        )


def tensor_parallelism_divides(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Every rank of tensor parallelism gets whole heads, and equal parts of all else."""
    degrees, dims = _degrees_or_given(job, world_size), _dims(job)
    parallelism = job.parallelism
    key, ranks = "parallelism.tensor_parallel_degree", degrees.tensor
    if ranks == 1:
        if parallelism.disable_loss_parallel:
            yield Problem("parallelism.disable_loss_parallel", f"no logits are divided; raise {key}, or leave it out")
        return
    sizes = {}
    if dims is not None:
        sizes = {
            "the model's attention heads": dims.n_heads,
            "its key and value heads": dims.kv_heads,
            "its vocabulary": dims.vocab_size,
        }
        if not all(dims.has_experts(layer) for layer in range(dims.n_layers)):
            sizes["its feed-forward's hidden features"] = dims.ffn_hidden_dim
    for what, size in sizes.items():
        if size % ranks:
            yield Problem(key, f"{ranks} ranks do not divide {what}, {size}; {_divisors(size, ranks)}")
    for section in (job.training, job.validation) if job.validation.enable else (job.training,):
        name = "validation" if section is job.validation else "training"
        for sequences in _sequences_at_a_time(section.local_batch_size, parallelism, degrees):
            tokens = sequences * section.seq_len // degrees.context
            if tokens % ranks:
                yield Problem(
                    key,
                    f"{ranks} ranks do not divide the {tokens} tokens that are computed at a time ({sequences} "
                    f"sequences of {name}.seq_len / context_parallel_degree); make {name}.seq_len a multiple of "
                    f"{ranks}",
                )


def _sequences_at_a_time(batch: int, parallelism: Any, degrees: MeshDegrees) -> set[int]:
    """Sequences in one forward pass: the batch, or the microbatches of a pipeline and what is left."""
    if degrees.pipeline == 1:
        return {batch}
    microbatch = parallelism.pipeline_parallel_microbatch_size
    return {min(microbatch, batch), batch % microbatch or microbatch}


def exchanges_overlap_in_compiled_blocks(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """The compiler finds the products beside the exchanges of tensor parallelism."""
    degrees, key = _degrees_or_given(job, world_size), "parallelism.enable_async_tensor_parallel"
    if not job.parallelism.enable_async_tensor_parallel:
        return
    if degrees.tensor == 1:
        yield Problem(key, "nothing is exchanged while parallelism.tensor_parallel_degree is 1; raise it")
    compiled = job.compile.enable and "model" in job.compile.components and job.compile.backend == "inductor"
    if not compiled:
        yield Problem(
            key,
            'the compiler overlaps the exchanges; set compile.enable = true with "model" in compile.components and '
            'compile.backend = "inductor"',
        )


def whole_vocabularies_are_chunked(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """The loss of some tokens at a time is that of one rank's whole output layer."""
    if not job.training.loss_chunk_tokens:
        return
    degrees, key = _degrees_or_given(job, world_size), "training.loss_chunk_tokens"
    if degrees.tensor > 1:
        yield Problem(
            key, "parallelism.tensor_parallel_degree divides the logits by the vocabulary instead; set it to 0"
        )
    if degrees.pipeline > 1:
        yield Problem(key, "a pipeline computes the loss of a microbatch at a time instead; set it to 0")
    if job.compile.enable and job.compile.components == ["loss"]:
        yield Problem("compile.components", f'leaves nothing to compile beside {key}; name "model"')


def options_of_an_axis_have_one(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """What belongs to an axis of the mesh means nothing where its length is 1."""
    degrees, parallelism = _degrees(job, world_size), job.parallelism
    if degrees is None:
        return
    for axis, length in (("pipeline", degrees.pipeline), ("context", degrees.context)):
        degree = f"{axis}_parallel_degree"
        for name, field in type(parallelism).model_fields.items():
            belongs = name.startswith(f"{axis}_parallel_") or (axis == "pipeline" and name.startswith("module_fqns"))
            value = getattr(parallelism, name)
            # What is turned off needs no axis.
            if length == 1 and belongs and name != degree and value != field.get_default() and value is not False:
                yield Problem(f"parallelism.{name}", f"has no effect while parallelism.{degree} is 1; raise it")


def sequences_are_spread(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Context parallelism cuts every sequence into equal parts, and its options mean something."""
    degrees, parallelism = _degrees_or_given(job, world_size), job.parallelism
    balancer = parallelism.context_parallel_load_balancer
    unknown = check_load_balancer(balancer)
    if degrees.context == 1:
        return
    if unknown is not None:
        yield Problem("parallelism.context_parallel_load_balancer", unknown, is_sentence=True)
        return
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable:
        lengths["validation.seq_len"] = job.validation.seq_len
    for key, seq_len in lengths.items():
        problem = check_sequence(seq_len, degrees.context, balancer, key)
        if problem is not None:
            yield Problem(key, problem, is_sentence=True)
    method = parallelism.context_parallel_rotate_method
    problem = check_rotate_method(method, job.model.attention_backend, job.training.document_masking)
    if problem is not None:
        yield Problem("parallelism.context_parallel_rotate_method", problem, is_sentence=True)


def pipeline_is_complete(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Every stage of a pipeline has layers, and every microbatch sequences."""
    degrees, dims, parallelism = _degrees_or_given(job, world_size), _dims(job), job.parallelism
    if dims is None or degrees.pipeline == 1:
        return
    problems = check_pipeline(
        parallelism,
        degree=degrees.pipeline,
        n_layers=dims.n_layers,
        tied_embeddings=dims.tied_embeddings,
        local_batch_size=job.training.local_batch_size,
    )
    for problem in problems:
        named = _BEGINS_WITH_KEY.match(problem)
        yield Problem(named.group(1) if named else "parallelism", problem, is_sentence=named is not None)
    if job.optimizer.early_step_in_backward:
        yield Problem(
            "optimizer.early_step_in_backward",
            "a pipeline's microbatches add to one gradient; leave it out, or set "
            "parallelism.pipeline_parallel_degree = 1",
        )


def data_exist(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """The data sources are known and have what they need."""
    specs: list[DatasetSpec] = []
    yield from _domain_problems("training", lambda: specs.append(training_spec(job.training)))
    if not specs:
        return
    path = job.training.dataset_path
    if path is not None and job.training.dataset.startswith(("c4", "hf:")):
        yield from _missing("training.dataset_path", path)
    if job.validation.enable:
        yield from _domain_problems("validation", lambda: specs.append(validation_spec(job.validation, job.training)))
    if job.training.txt_documents != "line" and all(spec.kind != "text" for spec in specs):
        yield Problem("training.txt_documents", "is for text, and no data set of this job is; leave it out")


def validation_ends(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """One validation is finite."""
    if not job.validation.enable or job.validation.steps != -1:
        return
    try:
        source = validation_spec(job.validation, job.training)
    except UserError:
        return
    if source.kind == "synthetic":
        yield Problem("validation.steps", f"{source.name} data have no end; say how many batches one validation takes")


def files_exist(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """Tokenizer and initial checkpoint are there."""
    assets, older = job.model.hf_assets_path, job.model.tokenizer_path
    if assets is not None and older is not None and Path(assets) != Path(older):
        yield Problem("model.tokenizer_path", "is an older name of model.hf_assets_path, which differs; keep that one")
    for key, path in (("model.hf_assets_path", assets), ("model.tokenizer_path", older)):
        if path is None:
            continue
        without = f"without the key, or with --{key}=None, the built-in one is used"
        remedy = f"scripts/download_tokenizer.py fetches one; {without}"
        yield from _missing(key, path, f"; {remedy}")
        folder = Path(path).expanduser()
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            yield Problem(key, f"is a folder without a tokenizer.json; {remedy}")
    if job.checkpoint.enable and job.checkpoint.initial_load_path is not None:
        yield from _missing("checkpoint.initial_load_path", job.checkpoint.initial_load_path)


def compiler_is_there_for_the_memory_budget(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """The compiler keeps to the memory budget, so it must compile the model."""
    if job.activation_checkpoint.mode == "memory_budget" and not (
        job.compile.enable and "model" in job.compile.components
    ):
        yield Problem(
            "activation_checkpoint.mode",
            'the compiler keeps to the budget; set compile.enable = true with "model" in compile.components',
        )


def seed_checkpoint_is_made_by_one_process(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """A seed checkpoint holds no sharded state."""
    if job.checkpoint.enable and job.checkpoint.create_seed_checkpoint and world_size > 1:
        yield Problem("checkpoint.create_seed_checkpoint", f"runs in one process, not {world_size}; set NGPU=1")


def family_can(job: "JobConfig", world_size: int) -> Iterator[Problem]:
    """What only some families have is there where it is asked for, and can be dealt out."""
    dims, degrees = _dims(job), _degrees_or_given(job, world_size)
    if dims is not None:
        yield from experts_exist(job, dims)
        yield from routers_learn(job, dims)
        yield from experts_are_dealt_out(job, dims, degrees)
        yield from experts_divide(job, dims, degrees)
        yield from batches_are_parted(job, dims, degrees)
        yield from budget_reaches_experts(job, dims, degrees)


RULES: tuple[Callable[[Any, int], Iterator[Problem]], ...] = (
    degrees_fit_the_processes,
    model_exists,
    converters_exist,
    parameters_hold_their_gradients,
    sharded_features_have_shards,
    tensor_parallelism_divides,
    exchanges_overlap_in_compiled_blocks,
    whole_vocabularies_are_chunked,
    options_of_an_axis_have_one,
    sequences_are_spread,
    pipeline_is_complete,
    data_exist,
    validation_ends,
    files_exist,
    batches_divide,
    early_steps_see_whole_gradients,
    schedule_covers_the_training,
    compiler_is_there_for_the_memory_budget,
    seed_checkpoint_is_made_by_one_process,
    family_can,
)
"""In the order in which their violations are listed."""


def _degrees(job: "JobConfig", world_size: int) -> MeshDegrees | None:
    """The resolved degrees, or None where `degrees_fit_the_processes` has something to say."""
    try:
        return resolve_degrees(job.parallelism, world_size)
    except UserError:
        return None


def _degrees_or_given(job: "JobConfig", world_size: int) -> MeshDegrees:
    """The resolved degrees; as they are given where they do not fit, for rules of one axis by itself."""
    return _degrees(job, world_size) or given_degrees(job.parallelism)


def _dims(job: "JobConfig") -> ModelDims | None:
    """The model's dimensions, or None where `model_exists` has something to say."""
    try:
        return resolve_dims(job.model.name, job.model.flavor, job.model.overrides.given())
    except (UserError, KeyError):
        return None


def _divisors(size: int, below: int) -> str:
    """`use 4 or 2`: the next degrees that work."""
    fitting = [degree for degree in range(below, 0, -1) if size % degree == 0][:2]
    return f"use {' or '.join(map(str, fitting))}"


def _domain_problems(section: str, action: Callable[[], object]) -> Iterator[Problem]:
    """What a component says about its section. A line that begins with a key belongs to that key's place."""
    try:
        action()
    except UserError as error:
        for line in str(error).split("\n"):
            named = _BEGINS_WITH_KEY.match(line)
            if named is not None and named.group(1).startswith(f"{section}."):
                yield Problem(named.group(1), line, is_sentence=True)
            else:
                yield Problem(section, line.removeprefix(f"{section}: "))


def _missing(key: str, path: str, remedy: str = "") -> Iterator[Problem]:
    if not Path(path).expanduser().exists():
        yield Problem(key, f"no such file or folder{remedy}")
