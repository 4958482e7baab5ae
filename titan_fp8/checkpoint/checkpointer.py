"""Saving and loading a run.

    step 500 done -> save(500)                                          a full checkpoint:
                       collect   live tensors by name; host state          model, optimizer, schedule, data position,
                       [stage    copy them to host memory]    async        step counts, random number generators
                       write     step-500.incomplete/...
                       commit    manifest, rename to step-500              from here on it counts
                       purge     what keep_latest_k no longer keeps

Synchronous saving does all of it before the next step. `async_mode = "async"` waits for the copy only and writes in a
background thread; `async_with_pinned_mem` copies while forward and backward of the next step run (`staging.py`). The
last save of a run is always synchronous, and at most one save is under way.

Every rank calls every method at the same step. What fails on one rank fails on all with one message (`ranks.py`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from titan_fp8.checkpoint import choice, fingerprint, folder, host_state, tensor_files, tensors
from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.checkpoint.folder import CheckpointError, Kind, Manifest
from titan_fp8.checkpoint.host_state import Stateful
from titan_fp8.checkpoint.ranks import Ranks
from titan_fp8.checkpoint.staging import HostCopies
from titan_fp8.runtime.logging import info_once

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class _Snapshot:
    """What one save writes: values that the training no longer touches, or is held back from touching."""

    kind: Kind
    step: int
    tensors: dict[str, Tensor]
    shared: dict[str, bytes]
    ranks: list[dict[str, bytes]]  # on rank 0 only


class Checkpointer:
    """Checkpoints of one run. Build it on all ranks, after the model, the optimizer and the data loader.

    With `config.enable = false` every method does nothing.

    Args:
        config: `[checkpoint]`.
        run_folder: `job.dump_folder`; checkpoints live in `run_folder / config.folder`.
        model_parts: the modules whose parameters are saved, initialized.
        optimizers: tensors by name, as `titan_fp8.optim.OptimizersContainer` gives them.
        lr_schedulers, train_state: state that is the same on all ranks.
        data_loader: state that may differ between ranks; None for none.
        fingerprint: what the run is, `{"model": {...}, "recipe": {...}}`; see `titan_fp8.checkpoint.fingerprint`.
        total_steps: `training.steps`.

    Raises:
        UserError: the settings contradict each other or need a device that is not there.
    """

    def __init__(
        self,
        config: CheckpointSection,
        run_folder: Path,
        *,
        model_parts: Sequence[nn.Module],
        optimizers: tensors.Optimizers,
        lr_schedulers: Stateful,
        train_state: Stateful,
        data_loader: Stateful | None,
        fingerprint: dict[str, Any],
        total_steps: int,
    ) -> None:
        self.config = config
        self.folder = Path(run_folder) / config.folder
        self.total_steps = total_steps
        self._model_parts = list(model_parts)
        self._optimizers = optimizers
        self._shared = {"lr_scheduler": lr_schedulers, "train_state": train_state}
        self._data_loader = data_loader
        self._fingerprint = fingerprint
        self._left_out: list[str] = []
        self._pending: Future[None] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._copies: HostCopies | None = None
        if not config.enable:
            return
        self._ranks = Ranks()
        _check_settings(config, self._ranks.world_size)
        if not self._ranks.distributed:
            tensor_files.expect_no_process_group()
        if config.async_mode != "disabled":
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self._copies = HostCopies(pinned=config.async_mode == "async_with_pinned_mem")

    # ---- loading

    def finished_step(self) -> int | None:
        """The step at which this run is finished already, None if there is something left to do.

        A checkpoint of any kind at `total_steps` or later means finished. Ask before `load`: such a run may have no
        checkpoint to resume from, and needs none.
        """
        if not self.config.enable:
            return None
        return self._ranks.on_rank_0(
            f"reading {self.folder}", lambda: choice.finished_step(self.folder, self.config, self.total_steps)
        )

    def load(self) -> int:
        """Load what `[checkpoint]` says and what is there, in place.

        Returns:
            Steps that the loaded state has behind it: 0 for a fresh start, for a seed, for weights only.

        Raises:
            CheckpointError: there is nothing usable, or it does not fit this run; no tensor was touched unless it says
                that the checkpoint is damaged.
        """
        if not self.config.enable:
            return 0
        exclusions = tensors.Exclusions(tuple(self.config.exclude_from_loading))
        chosen = self._ranks.on_rank_0(f"reading {self.folder}", self._choose)
        saved = self._look_into(chosen, exclusions)
        if not self.config.load_only:  # found out now, and not after the first `interval` steps
            self._ranks.on_rank_0(f"making {self.folder}", lambda: self.folder.mkdir(parents=True, exist_ok=True))
        if chosen is None:
            return 0
        assert saved is not None
        started = time.perf_counter()
        self._load_tensors(chosen, saved, exclusions)
        step = 0
        if chosen.full:
            assert chosen.manifest is not None
            step = chosen.manifest.step
            self._ranks.together(f"loading {chosen.path}", lambda: self._load_host_state(chosen.path, step, exclusions))
            step = 0 if exclusions.component("train_state") else step
        but = f" but {', '.join(exclusions.names)}" if exclusions.names else ""
        what = f"everything{but}, going on after step {step}" if chosen.full else f"the model's weights{but}"
        info_once(f"loaded {chosen.path} in {time.perf_counter() - started:.1f} s: {what}")
        return step

    def _choose(self) -> choice.Choice | None:
        chosen = choice.choose(self.folder, self.config)
        if chosen is not None:
            choice.check_fingerprint(chosen, self._fingerprint, self.config)
        return chosen

    def _look_into(self, chosen: choice.Choice | None, exclusions: tensors.Exclusions) -> Metadata | None:
        """The metadata of the chosen checkpoint, by which the exclusions are checked."""
        ours = self._ranks.all_gather(tensors.every_name(self._model_parts))  # ranks may have parts of the model
        names = {name for part in ours for name in part}

        def look() -> Metadata | None:
            saved = None if chosen is None else tensor_files.read_metadata(chosen.path)
            exclusions.check(names, chosen, saved)
            return saved

        self._left_out = exclusions.beyond(names)
        return self._ranks.together(f"reading {self.folder if chosen is None else chosen.path}", look)

    def _load_tensors(self, chosen: choice.Choice, saved: Metadata, exclusions: tensors.Exclusions) -> None:
        model = not exclusions.component("model")
        optimizer = chosen.full and not exclusions.component(tensors.OPTIMIZER)
        wanted: dict[str, Tensor] = {}
        if model:
            wanted |= tensors.without(tensors.model_tensors(self._model_parts), exclusions)
        if optimizer:
            wanted |= tensors.without(tensors.optimizer_tensors(self._optimizers), exclusions)

        shapes: dict[str, tuple[int, ...]] = {}
        for theirs in self._ranks.all_gather({name: tuple(value.shape) for name, value in wanted.items()}):
            shapes |= theirs

        def check() -> None:
            tensors.check_fit(chosen.path, saved, shapes, exclusions, model=model, optimizer=optimizer)

        reading = f"reading {chosen.path}"
        self._ranks.together(reading, check)
        with torch.no_grad():
            self._ranks.together(reading, lambda: tensor_files.read(chosen.path, wanted, self._ranks))
        if model:
            tensors.announce_loaded(self._model_parts)
        if optimizer:
            self._optimizers.load_state_dict(self._optimizers.state_dict())

    def _load_host_state(self, path: Path, step: int, exclusions: tensors.Exclusions) -> None:
        shared, ranks = host_state.read(path)
        for name, owner in self._shared.items():
            if not exclusions.component(name):
                owner.load_state_dict(host_state.unpack(shared[name]))
        rank, world_size = self._ranks.rank, self._ranks.world_size
        if self._data_loader is not None and not exclusions.component("dataloader"):
            self._data_loader.load_state_dict(host_state.data_state_for(ranks, rank, world_size))
        if not exclusions.component("rng"):
            host_state.restore_rng(ranks, rank, world_size, step)

    # ---- saving

    def is_due(self, step: int, last_step: bool = False, now: bool = False) -> bool:
        """Whether `save` with the same arguments saves something."""
        return self._kind_due(step, last_step, now) is not None

    def save(self, step: int, last_step: bool = False, now: bool = False) -> None:
        """Save after `step` steps if it is time to: every `interval` steps, after the first if asked, after the last;
        or `now`, if anything is ever saved.

        With `create_seed_checkpoint`, whatever is saved is a seed: the weights, as step 0.

        Raises:
            CheckpointError: this save failed, or the one before it that was written in the background. The files of
                earlier checkpoints are as they were.
        """
        kind = self._kind_due(step, last_step, now)
        if kind is None:
            return
        self._finish_pending()
        started = time.perf_counter()
        snapshot = self._collect(kind, step)
        if self._executor is None or last_step or now:
            self._write(snapshot, started)
            return
        assert self._copies is not None
        copied = replace(snapshot, tensors=self._copies.copy(snapshot.tensors))
        self._pending = self._executor.submit(self._write_copies, copied, started)
        if getattr(self._optimizers, "steps_in_backward", False):
            self.maybe_wait_for_staging()  # the next backward changes parameters

    def maybe_wait_for_staging(self) -> None:
        """Let no change of parameters overtake the copying of the save under way; call it before each change.

        On a GPU it is the computing stream that waits, not the caller.
        """
        if self._copies is not None:
            self._copies.hold_back_changes()

    def close(self) -> None:
        """Finish the save under way.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self._finish_pending()
        finally:
            if self._executor is not None:
                self._executor.shutdown()

    def _kind_due(self, step: int, last_step: bool, now: bool) -> Kind | None:
        config = self.config
        if not config.enable or config.load_only:
            return None
        if config.create_seed_checkpoint:
            return "seed"
        if last_step:
            return "model" if config.last_save_model_only else "full"
        due = now or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)
        return "full" if due else None

    def _collect(self, kind: Kind, step: int) -> _Snapshot:
        model = tensors.model_tensors(self._model_parts)
        if kind == "seed":
            return _Snapshot(kind, 0, model, {}, [])
        if kind == "model":
            return _Snapshot(kind, step, tensors.export(model, _DTYPES[self.config.export_dtype]), {}, [])

        def pack() -> tuple[dict[str, bytes], dict[str, bytes]]:
            # The loader comes first: its ranks may have to talk to each other, so none may fail before that.
            data = self._data_loader.state_dict() if self._data_loader is not None else None
            shared = {name: host_state.pack(owner.state_dict(), name) for name, owner in self._shared.items()}
            own = {"rng": host_state.capture_rng(), "dataloader": data}
            return shared, {name: host_state.pack(state, name) for name, state in own.items()}

        shared, own = self._ranks.together(f"collecting the state of step {step}", pack)
        everything = model | tensors.optimizer_tensors(self._optimizers)
        return _Snapshot(kind, step, everything, shared, self._ranks.gather_on_rank_0(own))

    def _write_copies(self, snapshot: _Snapshot, started: float) -> None:
        """In the background thread: wait for the copies, then write them."""
        assert self._copies is not None
        self._copies.wait()
        self._write(snapshot, started)

    def _write(self, snapshot: _Snapshot, started: float) -> None:
        """Write, commit, purge. A failure removes what was written of this checkpoint and nothing else."""
        ranks, writing = self._ranks, f"writing step-{snapshot.step} to {self.folder}"
        path = ranks.on_rank_0(writing, lambda: folder.begin(self.folder, snapshot.step))
        try:
            if snapshot.kind == "full":
                ranks.on_rank_0(writing, lambda: host_state.write(path, snapshot.shared, snapshot.ranks))
            ranks.together(writing, lambda: tensor_files.write(path, snapshot.tensors, ranks))
            ranks.on_rank_0(writing, lambda: self._commit(path, snapshot))
        except Exception:
            if ranks.rank == 0:
                folder.abandon(path)
            raise
        gone = ranks.on_rank_0(f"deleting old checkpoints in {self.folder}", self._purge)
        note = f", deleted {', '.join(old.name for old in gone)}" if gone else ""
        seconds = time.perf_counter() - started
        info_once(f"saved {self.folder / f'step-{snapshot.step}'} ({snapshot.kind}) in {seconds:.1f} s{note}")

    def _commit(self, path: Path, snapshot: _Snapshot) -> None:
        files = folder.sizes(path)
        tensor_files.check_whole(path, files)
        manifest = Manifest(
            kind=snapshot.kind,
            step=snapshot.step,
            world_size=self._ranks.world_size,
            fingerprint=fingerprint.normalized(self._fingerprint),
            versions=_versions(),
            saved_at_unix_s=folder.time_after_all(self.folder),
            files=files,
            left_out=self._left_out,
        )
        folder.commit(path, manifest)

    def _purge(self) -> list[Path]:
        return folder.purge(self.folder, self.config.keep_latest_k)

    def _finish_pending(self) -> None:
        """Wait for the save in the background and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _check_settings(config: CheckpointSection, world_size: int) -> None:
    if config.async_mode == "async_with_pinned_mem" and not torch.cuda.is_available():
        raise CheckpointError(
            'checkpoint.async_mode = "async_with_pinned_mem" needs a CUDA device and there is none; use "async"'
        )
    if config.create_seed_checkpoint and world_size > 1:
        raise CheckpointError(
            f"checkpoint.create_seed_checkpoint runs in one process, not {world_size}; start it with NGPU=1, then "
            "start the run in the same job.dump_folder on as many as you like"
        )


def _versions() -> dict[str, str]:
    try:
        own = version("titan-fp8")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"titan_fp8": own, "torch": torch.__version__, "python": platform.python_version()}
