"""`[checkpoint]`: what is saved when, and what is loaded at the start."""

from collections.abc import Iterator
from typing import Literal

from titan_fp8.config.section import Problem, Section, key, not_supported_yet

_SAVING = {"load_only": [False]}


class CheckpointSection(Section):
    """Saving and loading of the training's state."""

    switch = "enable"

    enable: bool = False
    """Save checkpoints, and resume from the newest complete one."""

    enable_ft_dataloader_checkpoints: bool = not_supported_yet(True)
    """With fault tolerance: save each replica's data state."""

    folder: str = key("checkpoint", min_length=1)
    """Folder of the checkpoints, relative to `job.dump_folder`. Each is a folder `step-N` in it."""

    interval: int = key(500, ge=1, unit="steps", only_with=_SAVING, parked_by=[True])
    """Steps between two checkpoints."""

    initial_load_path: str | None = None
    """Checkpoint folder (`.../step-N`) to start from when `folder` holds no checkpoint yet."""

    initial_load_model_only: bool = True
    """Take only the model's weights from `initial_load_path`, not the optimizer, schedule, data and step."""

    initial_load_in_hf: bool = not_supported_yet(False)
    """`initial_load_path` is in the Hugging Face format."""

    initial_load_in_hf_quantized: bool = not_supported_yet(False)
    """`initial_load_path` is in the Hugging Face format with quantized weights."""

    last_save_model_only: bool = key(True, only_with=_SAVING, parked_by=[True])
    """Save only the model's weights at the end of the training. Such a checkpoint is no resume point."""

    last_save_in_hf: bool = not_supported_yet(False)
    """Save the last checkpoint in the Hugging Face format."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = key(
        "float32", only_with={"last_save_model_only": [True]}, parked_by=[]
    )
    """Type of the weights in the last, model-only checkpoint."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = key(
        "disabled", only_with=_SAVING, parked_by=[True]
    )
    """`async` writes while training goes on; `async_with_pinned_mem` also copies from the GPU through page-locked
    memory that is kept, and needs a GPU."""

    keep_latest_k: int = key(10, ge=0, unit="checkpoints", only_with=_SAVING, parked_by=[True])
    """Older checkpoints are deleted once so many newer ones are complete. 0 keeps all. The newest full one always
    stays."""

    load_step: int = key(-1, ge=-1, unit="step")
    """Step to resume from. -1 means the newest complete one."""

    exclude_from_loading: list[str] = key([])
    """Parts of the state that are not taken from the checkpoint: `model`, `optimizer`, `lr_scheduler`, `dataloader`,
    `train_state`, `rng`, or parameters by any part of their name (`output`, `layers.*.attention.wq`). Those of the
    model keep their initial values and have a fresh optimizer state; those that only the checkpoint has are left
    out."""

    allow_model_change: bool = False
    """Load although the model's settings differ from those the checkpoint was written with. Tensors that are loaded
    must have the same names and shapes all the same."""

    allow_recipe_change: bool = False
    """Resume although the float8 recipe differs from the one the checkpoint was written with."""

    enable_first_step_checkpoint: bool = key(False, only_with=_SAVING, parked_by=[True])
    """Save after step 1 too, to find out early whether saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial state as step 0 and end. Runs in one process; runs on any number of processes can start from
    it."""

    load_only: bool = False
    """Load, and save nothing."""

    def problems(self) -> Iterator[Problem]:
        """What contradicts itself, or would do nothing."""
        if self.load_only and self.create_seed_checkpoint:
            yield Problem("create_seed_checkpoint", "saves a checkpoint, but checkpoint.load_only saves none")
        if self.enable and not self.initial_load_model_only and self.initial_load_path is None:
            yield Problem("initial_load_model_only", "has no effect without checkpoint.initial_load_path")
