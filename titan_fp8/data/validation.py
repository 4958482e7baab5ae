"""Held-out data in a fixed order, the same at every validation of a run and for every seed.

The tokens of all validation documents form one sequence, cut into samples as for training but never shuffled: batch b
of rank r of R takes the samples (b R + r) B, ..., (b R + r + 1) B - 1. All ranks get the same number of batches, as
collective calls need. With `validation.steps = -1` every token is a label exactly once, on any number of ranks: the
last sample is filled up with padding that the loss leaves out, and so are whole rows where the samples do not fill
the last batch of all ranks. Text is tokenized once, when the loader is built.

Legend: B sequences a batch, R ranks.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from titan_fp8.data.batch import Batch
from titan_fp8.data.config import TrainingSection, ValidationSection
from titan_fp8.data.dataset_spec import DatasetSpec, training_spec, validation_spec
from titan_fp8.data.documents import check_text, find_text_files, load_text
from titan_fp8.data.feeds import open_stream, stream_texts
from titan_fp8.data.prefetch import Job, Part, prefetch_pass, worker_count
from titan_fp8.data.sources import BlockSource, Position, Source, StepPlan, SyntheticSource, collect_tokens
from titan_fp8.data.token_store import ArrayStore, TokenStore, open_shards
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.data.workers import WorkerPool
from titan_fp8.runtime.errors import UserError

T = TypeVar("T")

_SEED = 0
"""Validation does not follow the run's seed, so that runs with different seeds are compared on the same samples."""


class ValidationLoader:
    """This rank's validation batches. Each iteration is one whole validation."""

    def __init__(self, source: Source, plan: StepPlan, batches: int, validation: ValidationSection) -> None:
        self._job = Job(source, Position(), plan, batches)
        self._section = validation.dataloader
        self._pool: WorkerPool[Part] | None = None

    def __len__(self) -> int:
        """Batches of each rank in one validation."""
        assert self._job.steps is not None
        return self._job.steps

    def __iter__(self) -> Iterator[Batch]:
        keep = self._section.persistent_workers
        workers = worker_count(self._job, self._section)
        pool = self._pool or (WorkerPool(self._job, workers, repeat=keep) if workers else None)
        self._pool = None
        complete = False
        steps = prefetch_pass(self._job, pool, self._section, pin_memory=self._section.pin_memory)
        try:
            for step in steps:
                yield from step.batches
            complete = True
        finally:
            if pool is not None and keep and complete:
                self._pool = pool
            elif pool is not None:
                pool.close()
            steps.close()

    def close(self) -> None:
        """End the worker processes that were kept."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def build_validation_loader(
    validation: ValidationSection,
    training: TrainingSection,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    local_batch_sequences: int,
    dp_rank: int,
    dp_world_size: int,
) -> ValidationLoader:
    """The loader of the validation data for one rank.

    Args:
        validation: the job's section; `dataset`, `dataset_path`, `steps` and `dataloader` among others.
        training: the training section, for the source to hold out from and for `document_masking`.
        tokenizer: the job's tokenizer.
        seq_len: tokens a sequence.
        local_batch_sequences: sequences in a batch of a rank.
        dp_rank: this data-parallel rank.
        dp_world_size: number of data-parallel ranks.

    Raises:
        UserError: no held-out data, data that is also trained on, `validation.steps = -1` with endless
            data; and as `build_train_loader`.
    """
    spec = validation_spec(validation, training)
    steps = validation.steps
    if steps < 0 and spec.kind in ("synthetic", "stream"):
        raise UserError(
            f"validation.steps = -1 means all of the validation data, but {spec.name!r} has no known end; "
            "set validation.steps to a number of batches"
        )
    plan = StepPlan(local_batch_sequences * dp_world_size, local_batch_sequences, dp_rank, dp_world_size)
    masking = training.document_masking
    if spec.kind == "synthetic":
        source = SyntheticSource(tokenizer, seq_len, _SEED, document_masking=masking, validation=True)
        return ValidationLoader(source, plan, steps, validation)
    limit = None if steps < 0 else steps * plan.global_batch * seq_len + 1
    blocks = BlockSource(
        _validation_tokens(spec, training, tokenizer, limit),
        seq_len,
        _SEED,
        tokenizer.fingerprint,
        shuffle=False,
        document_masking=masking,
        padding=tokenizer.eos_id,
        name=spec.name,
    )
    if not blocks.blocks:
        raise UserError(f"the validation data of {spec.name!r} holds no text")
    available = -(-blocks.blocks // plan.global_batch)
    return ValidationLoader(blocks, plan, available if steps < 0 else min(steps, available), validation)


def check_validation_data(validation: ValidationSection, training: TrainingSection, tokenizer: Tokenizer) -> None:
    """Refuse what `build_validation_loader` would refuse, as far as it shows without reading the data.

    Raises:
        UserError: token shards that cannot be used; text files that are missing, empty, have no column `text` or are
            also trained on.
    """
    spec = validation_spec(validation, training)
    if spec.kind == "tokens":
        _validation_tokens(spec, training, tokenizer, None)
    elif spec.kind == "text":
        _validation_texts(spec, training, check_text)


def _validation_tokens(
    spec: DatasetSpec, training: TrainingSection, tokenizer: Tokenizer, limit: int | None
) -> TokenStore:
    if spec.kind == "stream":
        return ArrayStore(*collect_tokens(stream_texts(open_stream(spec)), tokenizer, limit))
    assert spec.path is not None
    if spec.kind == "text":
        return ArrayStore(*collect_tokens(_validation_texts(spec, training, load_text), tokenizer, limit))
    return open_shards(Path(spec.path), "train" if spec.own_path else "validation", tokenizer)


def _validation_texts(spec: DatasetSpec, training: TrainingSection, use: Callable[..., T]) -> T:
    """What `use` (`load_text` or `check_text`) makes of the validation split."""
    path = Path(spec.path or "")
    trained = training_spec(training)
    if spec.own_path and trained.kind == "text":
        files = find_text_files(path)
        read = {file.resolve() for file in files.validation or files.train}
        shared = sorted(read & {file.resolve() for file in find_text_files(Path(trained.path or "")).train})
        if shared:
            raise UserError(
                f"validation.dataset_path = {str(path)!r}: {shared[0]} is also trained on; "
                "move it, or name it validation* to keep it out of the training"
            )
    return use(
        path,
        "validation",
        hold_out_every=None if spec.own_path else training.hold_out_every,
        txt_documents=training.txt_documents,
        whole=spec.own_path,
    )
