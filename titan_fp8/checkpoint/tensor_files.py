"""Tensors to files and back, by torch.distributed.checkpoint: every rank writes its own slices into one file.

What fails in there is put into the words of this package: a full disk is an OSError and a damaged file a
CheckpointError, where torch would show an error of its archive reader or writer.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from titan_fp8.checkpoint.folder import METADATA_NAME, REMEDY, CheckpointError
from titan_fp8.checkpoint.ranks import Ranks


def expect_no_process_group() -> None:
    """Let a run without a process group be: torch would warn of it at every save and load."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write the tensors of all ranks into the folder `path`, flushed."""
    save(tensors, storage_writer=_Writer(path), process_group=ranks.group, no_dist=not ranks.distributed)


def read(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors` in place from the folder `path`, each rank its own slices."""
    load(tensors, storage_reader=_Reader(path), process_group=ranks.group, no_dist=not ranks.distributed)


def read_metadata(path: Path) -> Metadata:
    """Names and shapes of a checkpoint's tensors.

    Raises:
        CheckpointError: the folder has none, or they cannot be read.
    """
    try:
        return _Reader(path).read_metadata()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no {METADATA_NAME} file") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path / METADATA_NAME} cannot be read: {error}; {REMEDY}") from error


def check_whole(path: Path, sizes: dict[str, int]) -> None:
    """Raise a CheckpointError unless every tensor that any rank wrote lies within a file that this process sees."""
    for place in read_metadata(path).storage_data.values():
        if sizes.get(place.relative_path, -1) < place.offset + place.length:
            raise CheckpointError(
                f"{path / place.relative_path}, written by another rank, is not whole as rank 0 sees it; "
                "job.dump_folder must be on a file system that all machines share"
            )


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(self.path)) from error


class _Reader(FileSystemReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        try:
            return super().read_data(plan, planner)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; {REMEDY}") from error
