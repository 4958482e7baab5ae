"""The model of a job on the meta device, converted: what `plan` prints, the checks look at and the trainer trains.

Everything that can be wrong with a model (dimensions that do not divide, a filter that matches nothing, a recipe that
the device cannot run, a tokenizer with more codes than the embedding) shows on tensors without storage. So the model is
built and converted there first, in a second even for 405B, before any process group exists, and all of its violations
are reported together, along with what is wrong with the run's folder, its data and the checkpoint that it would load.
The same object is then sharded and materialized by the trainer.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from titan_fp8.checkpoint.preview import check_loading
from titan_fp8.config.errors import ConfigErrors, Violation
from titan_fp8.converters.protocol import Converter, Placement
from titan_fp8.converters.registry import build_converters
from titan_fp8.converters.report import ConversionReport
from titan_fp8.data.loader import check_training_data
from titan_fp8.data.tokenizer import Tokenizer, build_tokenizer, check_vocab
from titan_fp8.data.validation import check_validation_data
from titan_fp8.job_config import JobConfig
from titan_fp8.models.arithmetic import flops_per_token
from titan_fp8.models.chunked_loss import chunk_loss
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.observability.run_folder import check_run_folder
from titan_fp8.parallel.apply import check_parallelization
from titan_fp8.parallel.degrees import resolve_degrees
from titan_fp8.parallel.expert_load import force_balance
from titan_fp8.parallel.pipeline_split import PipelinePlan, plan_pipeline
from titan_fp8.quantization.chunked_head import chunk_float8_loss
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_chunked_head import chunk_mx_loss
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.runtime.device import DeviceCapabilities, detect_device
from titan_fp8.runtime.errors import UserError

T = TypeVar("T")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""The dtypes that `[training]` can name."""


@dataclass(frozen=True)
class ModelPlan:
    """A converted model on the meta device with all that was decided on the way.

    Attributes:
        dims: the flavor's dimensions with the overrides applied.
        tokenizer: the job's tokenizer; its codes fit the vocabulary.
        model: the decoder, on the meta device, converted.
        converters: the converters, in the order of `model.converters`; `pre_training` runs before the first step
            and `post_optimizer` after each.
        reports: one report a converter.
        flops_per_token: model FLOPs of forward and backward for one token of a training sequence.
        pipeline: how the model is cut into stages; None: it is not.
    """

    dims: ModelDims
    tokenizer: Tokenizer
    model: Decoder
    converters: list[Converter]
    reports: list[ConversionReport]
    flops_per_token: float
    pipeline: PipelinePlan | None = None


class _Collector:
    """Runs the steps of a plan and keeps what the failing ones say."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def __call__(self, place: str, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except UserError as error:
            messages = getattr(error, "violations", None) or str(error).split("\n")
            told = {violation.message for violation in self.violations}  # two steps may know of one rule
            self.violations += [Violation(place, message) for message in messages if message not in told]
            return None


def plan_model(job: JobConfig, device: DeviceCapabilities) -> ModelPlan:
    """Build and convert the model of `job` on the meta device. Files are looked at, and none is written.

    Raises:
        ConfigErrors: with every rule that the model, its converters, its tokenizer, the attention backend or, on rank
            0, the run's folder, data and checkpoint break.
    """
    attempt = _Collector()
    section = job.model
    dims = attempt("model", lambda: resolve_dims(section.name, section.flavor, section.overrides.model_dump()))
    tokenizer = attempt("model", lambda: build_tokenizer(section.hf_assets_path, section.tokenizer_path))
    converters = attempt(
        "model.converters", lambda: build_converters(section.converters, job.quantize, device, _placement(job))
    )
    if dims is None:
        raise ConfigErrors(attempt.violations)
    if tokenizer is not None:
        attempt("model", lambda: check_vocab(tokenizer, dims.vocab_size))
    model = attempt("model", lambda: _build_meta_model(job, dims, device))
    reports = []
    if model is not None:
        conversions = [partial(converter.convert, model) for converter in converters or []]
        reports = [attempt("model.converters", conversion) for conversion in conversions]
        attempt("", partial(_check_parallelization, job, model, device))
        if job.training.loss_chunk_tokens:
            attempt("", partial(_chunk_loss, model.output, job.training.loss_chunk_tokens))
    attempt("", partial(_check_device, job, device))
    if os.environ.get("RANK", "0") == "0":
        # The files as rank 0 sees them. Where another node sees others, it is the ranks together that find out later.
        whole = model is not None and converters is not None and None not in reports
        _check_files(job, attempt, tokenizer, model, run_fingerprint(job, dims, reports) if whole else None)
    if attempt.violations:
        raise ConfigErrors(attempt.violations)
    assert tokenizer is not None
    assert converters is not None
    assert model is not None
    return ModelPlan(
        dims=dims,
        tokenizer=tokenizer,
        model=model,
        converters=converters,
        reports=[report for report in reports if report is not None],
        flops_per_token=flops_per_token(dims, job.training.seq_len),
        pipeline=_pipeline(job, dims),
    )


def _chunk_loss(output: Any, chunk_tokens: int) -> None:
    """Have an output layer, of whatever kind, compute the loss some tokens at a time.

    Raises:
        UserError: it cannot.
    """
    if isinstance(output, Float8Linear):
        chunk_float8_loss(output, chunk_tokens)
    elif isinstance(output, MXFP8Linear):
        chunk_mx_loss(output, chunk_tokens)
    else:
        chunk_loss(output, chunk_tokens)


def _pipeline(job: JobConfig, dims: ModelDims) -> PipelinePlan | None:
    degree = resolve_degrees(job.parallelism, int(os.environ.get("WORLD_SIZE", "1"))).pipeline
    if degree == 1:
        return None
    return plan_pipeline(
        job.parallelism,
        degree=degree,
        n_layers=dims.n_layers,
        tied_embeddings=dims.tied_embeddings,
        local_batch_size=job.training.local_batch_size,
    )


def _placement(job: JobConfig) -> Placement:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    degrees = resolve_degrees(job.parallelism, ranks)
    return Placement(
        ranks,
        degrees.shards,
        offloaded=job.training.enable_cpu_offload,
        tensor=degrees.tensor,
        expert_tensor=degrees.expert_tensor,
        expert=degrees.expert,
        expert_shards=degrees.expert_shards if degrees.experts_are_apart else degrees.shards,
        experts_stay=degrees.expert > 1
        and degrees.expert_shards * degrees.data_parallel_replicate == 1
        and not job.training.enable_cpu_offload,
    )


def run_fingerprint(job: JobConfig, dims: ModelDims, reports: Sequence[ConversionReport | None]) -> dict[str, Any]:
    """What a checkpoint must agree with: the model's dimensions and the recipes its weights were trained with."""
    return {
        "model": {"name": job.model.name, **dims.recorded()},
        "recipe": {report.converter: report.fingerprint() for report in reports if report is not None},
    }


def _check_files(
    job: JobConfig,
    attempt: _Collector,
    tokenizer: Tokenizer | None,
    model: Decoder | None,
    fingerprint: dict[str, Any] | None,
) -> None:
    """What the run would read and where it would write. Nothing is read whole, and nothing is written."""
    attempt("", partial(check_run_folder, job.job.dump_folder))
    if tokenizer is not None:
        before = len(attempt.violations)
        attempt("training.dataset_path", partial(check_training_data, job.training, tokenizer))
        told = len(attempt.violations) > before and job.validation.dataset_path is None  # the same data, told already
        if job.validation.enable and not told:
            validation = partial(check_validation_data, job.validation, job.training, tokenizer)
            attempt("validation.dataset_path", validation)
    folder = Path(job.job.dump_folder).expanduser().absolute()
    steps = job.training.steps
    loading = partial(check_loading, job.checkpoint, folder, model=model, fingerprint=fingerprint, total_steps=steps)
    attempt("", loading)


def _check_parallelization(job: JobConfig, model: Decoder, device: DeviceCapabilities) -> None:
    check_parallelization(
        model,
        device_type=device.kind,
        activation_checkpoint=job.activation_checkpoint,
        compile_config=job.compile,
        cpu_offload=job.training.enable_cpu_offload,
        tensor_ranks=_placement(job).tensor,
        async_tensor_parallel=job.parallelism.enable_async_tensor_parallel,
        fsdp_exchange=job.parallelism.fsdp_exchange,
    )


def _check_device(job: JobConfig, device: DeviceCapabilities) -> None:
    """What only a GPU can do is asked of a GPU."""
    if device.kind == "cuda":
        return
    pinned_save = job.checkpoint.enable and job.checkpoint.async_mode == "async_with_pinned_mem"
    asked = {
        "training.dataloader.pin_memory": job.training.dataloader.pin_memory,
        "validation.dataloader.pin_memory": job.validation.enable and job.validation.dataloader.pin_memory,
        'checkpoint.async_mode = "async_with_pinned_mem"': pinned_save,
        "profiling.enable_memory_snapshot": job.profiling.enable_memory_snapshot,
        "profiling.trace_cpu = false": job.profiling.enable_profiling and not job.profiling.trace_cpu,
    }
    faults = [
        f"{key}: needs a GPU, but this job runs on a {device.kind}; turn it off" for key, on in asked.items() if on
    ]
    if faults:
        raise UserError("\n".join(faults))


def _build_meta_model(job: JobConfig, dims: ModelDims, device: DeviceCapabilities) -> Decoder:
    lengths = [job.training.seq_len, *([job.validation.seq_len] if job.validation.enable else [])]
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job.training.dtype])
    try:
        with torch.device("meta"):
            model = Decoder(
                dims,
                attention_backend=job.model.attention_backend,
                document_masking=job.training.document_masking,
                seq_len=max(lengths),
                compute_dtype=DTYPES[job.training.mixed_precision_param],
                device=device,
            )
        if job.debug.moe_force_load_balance:
            force_balance(model)
        return model
    finally:
        torch.set_default_dtype(default_dtype)


def check_model(job: JobConfig) -> list[Violation]:
    """The rules that need the model, on the meta device; empty if it can be built and converted as asked."""
    try:
        plan_model(job, detect_device())
    except ConfigErrors as errors:
        return errors.violations
    return []
