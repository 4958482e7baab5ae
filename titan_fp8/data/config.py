"""`[training]` and `[validation]`: the data, the batch, and how long and in which precision to train.

B sequences of S tokens make one microbatch of a rank. One optimizer step consumes `global_batch_size` sequences, that
is `global_batch_size / (local_batch_size * data-parallel degree)` microbatches a rank.
"""

from collections.abc import Iterator
from typing import Literal

from titan_fp8.config.section import CountOrAuto, Problem, Section, key

DATASETS = ("synthetic", "text", "tokens", "c4", "c4_validation", "c4_test")
"""Named data sources. Besides these, `hf:<name>` streams any data set of the Hugging Face hub."""

HUB_PREFIX = "hf:"


MAX_BATCH = 2**20
MAX_GLOBAL_BATCH = 2**30
MAX_SEQ_LEN = 2**27
MAX_STEPS = 2**31
"""Far above all that is trained, and low enough that the number of samples of a run fits into 64 bits."""


class DataloaderSection(Section):
    """How batches are prepared beside the training step."""

    num_workers: int = key(0, ge=0, le=1024, unit="processes")
    """Processes that tokenize and pack. 0 prepares batches in a thread of the training process."""

    persistent_workers: bool = False
    """Keep the worker processes when the data is read again from its start, which only validation does: those of the
    training stay in any case. Needs `num_workers` > 0."""

    pin_memory: bool = False
    """Put batches into page-locked memory ahead of the step, where they are prepared. Needs a GPU."""

    prefetch_factor: int | None = key(None, ge=1, le=MAX_BATCH, unit="batches per worker")
    """Batches that each worker prepares ahead. Needs `num_workers` > 0; unset means 2."""

    def problems(self) -> Iterator[Problem]:
        """What only worker processes can do needs some."""
        if self.num_workers == 0:
            if self.persistent_workers:
                yield Problem("persistent_workers", "needs num_workers of at least 1")
            if self.prefetch_factor is not None:
                yield Problem("prefetch_factor", "needs num_workers of at least 1")


class TrainingSection(Section):
    """Data, batch, length and precision of the training."""

    dataset: str = "synthetic"
    """Source of the training data: `synthetic` (built in, endless, no files), `text` (local txt, json, jsonl, parquet
    or arrow at `dataset_path`), `tokens` (shards written by `titan-fp8 prepare`, at `dataset_path`), `c4`,
    `c4_validation`, `hf:<name>` (streamed from the Hugging Face hub), or `c4_test` (the same as `synthetic`, and with a
    `dataset_path` the same as `text`)."""

    dataset_path: str | None = None
    """File or folder of the data. `text` and `tokens` need it. In a folder, files named `validation*` are the
    validation split and are never trained on."""

    hold_out_every: int | None = key(None, ge=0, unit="documents")
    """Of `text`, each n-th document is held out for validation and never trained on, whether validation is enabled or
    not. 0 holds out none, unset means 100. A folder with files named `validation*` has its split already."""

    txt_documents: Literal["line", "paragraph", "file"] = "line"
    """What of a txt file is one document: each line, each block between empty lines, or the file."""

    local_batch_size: int = key(8, ge=1, le=MAX_BATCH, unit="sequences per rank")
    """Sequences in one microbatch of one data-parallel rank."""

    global_batch_size: CountOrAuto = key(-1, le=MAX_GLOBAL_BATCH, unit="sequences")
    """Sequences in one optimizer step over all ranks; more than one microbatch a rank means gradient accumulation.
    -1 means `local_batch_size` times the data-parallel degree."""

    seq_len: int = key(2048, ge=1, le=MAX_SEQ_LEN, unit="tokens")
    """Length of a sequence."""

    max_norm: float = key(1.0, ge=0)
    """Gradients are scaled down so that their global L2 norm is at most this. 0 turns clipping off."""

    steps: int = key(10000, ge=1, le=MAX_STEPS, unit="optimizer steps")
    """Length of the training."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state of FSDP in the host's memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the parameters and of the optimizer's state. `bfloat16` saves memory and loses small updates."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and of the weights in matrix products, on one GPU as well as on many."""

    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Type in which data-parallel ranks sum their gradients. `bfloat16` moves half the bytes. Microbatches are added up
    in `dtype` all the same, but with copies of the model (`data_parallel_replicate_degree`) in this type."""

    loss_chunk_tokens: int = key(0, ge=0, unit="tokens")
    """Compute the logits and their loss for so many tokens of a rank at a time, so that those of all tokens never exist
    at once. 0 computes all at once. A float8 output layer rounds it up to a multiple of 16, blockwise of 128."""

    gc_freq: int = key(50, ge=1, unit="steps")
    """Python's garbage is collected every so many steps, on all ranks at the same step, and not in between."""

    gc_debug: bool = False
    """Collect at every step and log what was collected, to find reference cycles that hold tensors. Slow."""

    document_masking: bool = False
    """Tokens attend only to tokens of their own document in a packed sequence."""

    shuffle: bool = True
    """Read a finite data set in an order that depends on `debug.seed` and the epoch, instead of in file order."""

    nonfinite_policy: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run with an error, or skip that optimizer step."""

    max_nonfinite_steps: int = key(10, ge=1, unit="steps", only_with={"nonfinite_policy": ["skip"]})
    """With `nonfinite_policy = "skip"`: more skipped steps than this in one run end it with an error."""

    dataloader: DataloaderSection = DataloaderSection()
    """How training batches are prepared."""


class ValidationSection(Section):
    """Loss on held-out data at fixed steps."""

    switch = "enable"

    enable: bool = False
    """Measure the validation loss every `freq` steps and at the end."""

    dataset: str | None = None
    """Source of the validation data, named as in `training.dataset`. Unset means a held-out split of the training
    source."""

    dataset_path: str | None = None
    """File or folder of the validation data."""

    local_batch_size: int = key(8, ge=1, le=MAX_BATCH, unit="sequences per rank")
    """Sequences in one validation batch of one data-parallel rank."""

    seq_len: int = key(2048, ge=1, le=MAX_SEQ_LEN, unit="tokens")
    """Length of a validation sequence."""

    freq: int = key(10, ge=1, unit="steps")
    """Training steps between two validations."""

    steps: CountOrAuto = key(-1, le=MAX_STEPS, unit="batches per rank")
    """Batches in one validation. -1 means all of the validation data, which must then be finite."""

    dataloader: DataloaderSection = DataloaderSection()
    """How validation batches are prepared."""
