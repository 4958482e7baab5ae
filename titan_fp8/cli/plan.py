"""`titan-fp8 plan ARGS`: what a training command would build, without training.

Takes the options of the trainer (`--job.config_file`, `--section.key value`) and prints the model's size, how the ranks
are arranged, the batch, the memory that parameters and optimizer take on each rank, and the converters' whole report.
WORLD_SIZE in the environment is the number of processes to plan for.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from titan_fp8.config.errors import ConfigErrors, HelpRequested
from titan_fp8.job_config import JobConfig, load_job_config

if TYPE_CHECKING:
    from titan_fp8.models.dims import ModelDims
    from titan_fp8.parallel.degrees import MeshDegrees


def main(argv: Sequence[str]) -> int:
    """Print the plan; 2 for a mistake in the configuration."""
    try:
        job, notices = load_job_config(argv)
        for notice in notices:
            print(notice, file=sys.stderr)
        print(describe(job, int(os.environ.get("WORLD_SIZE", "1"))))
    except HelpRequested as help_text:
        print(help_text)
    except ConfigErrors as errors:
        print(errors.render(), file=sys.stderr)
        return 2
    return 0


def describe(job: JobConfig, world_size: int) -> str:
    """The plan as text.

    Raises:
        ConfigErrors: the model or its converters break a rule.
    """
    # torch is imported only once the configuration itself is known to be right.
    from titan_fp8.model_plan import plan_model
    from titan_fp8.models.arithmetic import count_parameters
    from titan_fp8.parallel.degrees import resolve_degrees
    from titan_fp8.runtime.device import detect_device

    device = detect_device()
    plan = plan_model(job, device)
    degrees = resolve_degrees(job.parallelism, world_size)
    training = job.training
    parameters = count_parameters(plan.dims)
    batch = training.global_batch_size
    if batch < 0:
        batch = training.local_batch_size * degrees.data_parallel
    # Parameter, gradient and the optimizer's two running means.
    dtypes = [training.dtype] * 2 + [job.optimizer.state_dtype or training.dtype] * 2
    bytes_per_parameter = sum(4 if dtype == "float32" else 2 for dtype in dtypes)
    parts = degrees.shards * degrees.tensor * degrees.pipeline
    state_gib = parameters * bytes_per_parameter / parts / 2**30
    lines = [
        f"model        {job.model.name} {job.model.flavor}: {parameters:,} parameters, {plan.dims.n_layers} layers",
        f"tokenizer    {plan.tokenizer.name}: {plan.tokenizer.vocab_size:,} of {plan.dims.vocab_size:,} codes",
        f"attention    {plan.model.attention_backend}",
        f"device       {device.name}",
        f"ranks        {_ranks(degrees)}",
        *([] if plan.dims.n_experts is None else [f"experts      {_experts(plan.dims, degrees)}"]),
        f"step         {batch} sequences x {training.seq_len} tokens = {batch * training.seq_len:,} tokens, "
        f"{plan.flops_per_token * batch * training.seq_len / 1e12:,.1f} TFLOP",
        f"state        {state_gib:.2f} GiB a rank for parameters, gradients and optimizer",
    ]
    lines += ["", *(str(report) for report in plan.reports)] if plan.reports else ["converters   none"]
    return "\n".join(lines)


def _ranks(degrees: "MeshDegrees") -> str:
    further = {
        "ranks for each sequence": degrees.context,
        "ranks for each matrix product": degrees.tensor,
        "stages of layers": degrees.pipeline,
    }
    parts = [f"{count} {what}" for what, count in further.items() if count > 1]
    copies = f"{degrees.data_parallel_replicate} copies of the model in {degrees.shards} shards"
    return ", ".join([copies, *parts])


def _experts(dims: "ModelDims", degrees: "MeshDegrees") -> str:
    """How the experts of a layer lie on the ranks."""
    assert dims.n_experts is not None
    layers = sum(dims.has_experts(layer) for layer in range(dims.n_layers))
    of_layers = f"{dims.n_experts} in each of {layers} layers, {dims.top_k} for a token"
    dealt = f"{degrees.expert} parts of {dims.n_experts // degrees.expert}, {degrees.expert_shards} shards of each"
    divided = f", each expert over {degrees.expert_tensor} ranks" if degrees.expert_tensor > 1 else ""
    return f"{of_layers}; {dealt}{divided}"
