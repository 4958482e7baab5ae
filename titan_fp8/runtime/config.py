"""`[comm]`, `[debug]` and `[experimental]`: the processes, and the means to find faults."""

from typing import Literal

from titan_fp8.config.section import Section, key, not_supported_yet


class CommSection(Section):
    """Communication between processes."""

    init_timeout_seconds: int = key(300, ge=1, unit="s")
    """Timeout of collectives until the first step is done: start-up and compilation take their time."""

    train_timeout_seconds: int = key(100, ge=1, unit="s")
    """Timeout of collectives after the first step."""

    trace_buf_size: int = key(20000, ge=0, unit="entries")
    """Length of NCCL's flight recorder, which is written when a collective times out. 0 turns it off."""

    save_traces_folder: str = key("comm_traces", min_length=1)
    """Folder of the flight recorder's files, relative to `job.dump_folder`."""

    save_traces_file_prefix: str = key("rank_", min_length=1)
    """How the names of these files begin; the rank follows."""

    mode: Literal["default", "fake_backend", "local_tensor"] = not_supported_yet("default")
    """Real communication, or a stand-in that needs one process."""


class DebugSection(Section):
    """Seeds and determinism."""

    seed: int | None = key(None, ge=0, le=2**63 - 1)
    """Seed of the initial weights, of the order of the data and of all else that is random. Unset draws one, which is
    logged and saved with the run."""

    deterministic: bool = False
    """Use only algorithms that give the same bits again. Slower on a GPU."""

    deterministic_warn_only: bool = key(False, only_with={"deterministic": [True]})
    """With `deterministic`: warn about an operation that has no such algorithm instead of ending the run."""

    moe_force_load_balance: bool = False
    """Route tokens to the experts evenly, whatever the router says, to measure speed."""


class ExperimentalSection(Section):
    """Hooks for code of one's own."""

    custom_import: str = not_supported_yet("")
    """Python module to import before the training starts."""

    custom_args_module: str = not_supported_yet("")
    """Older name of `job.custom_config_module`; use that one."""
