"""The part of a run's state that is no tensor of model or optimizer: step counts, schedule, data position, randomness.

It is small, so it is gathered and written as one file by rank 0:

    {"shared": {"train_state": ..., "lr_scheduler": ...},          the same on all ranks
     "ranks": [{"rng": ..., "dataloader": ...}, ...]}              one entry a rank

Each entry is the bytes of a `torch.save` that `torch.load(weights_only=True)` reads back, checked when it is made: a
state that could not be read is found while the run that made it is still there.

Randomness belongs to a rank. On another number of ranks the old states have no meaning, so every generator is seeded
anew from (the run's seed, rank, step): the run is repeatable, but it is not the run that would have gone on.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from titan_fp8.checkpoint.folder import REMEDY, CheckpointError
from titan_fp8.runtime.logging import info_once

FILE_NAME = "host_state.pt"


class Stateful(Protocol):
    """Anything with a state of plain values (numbers, strings, bytes, lists, dicts, tensors)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def pack(state: Any, owner: str) -> bytes:
    """The state as bytes.

    Raises:
        TypeError: it holds something that cannot be read back safely; `owner` says whose state it is.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        unpack(buffer.getvalue())
    except pickle.UnpicklingError as error:
        raise TypeError(f"the state of {owner} holds more than plain values and tensors: {error}") from error
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given."""
    return torch.load(io.BytesIO(data), weights_only=True)


def write(path: Path, shared: dict[str, bytes], ranks: list[dict[str, bytes]]) -> None:
    """Write the file of one checkpoint, flushed."""
    with (path / FILE_NAME).open("wb") as stream:
        stream.write(pack({"shared": shared, "ranks": ranks}, "the checkpoint"))
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> tuple[dict[str, bytes], list[dict[str, bytes]]]:
    """The shared states and each rank's, still packed.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = path / FILE_NAME
    try:
        data = file.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load leaves the archive's checksums alone
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{file} is damaged: {damaged} does not match its checksum; {REMEDY}")
        content = unpack(data)
        return content["shared"], content["ranks"]
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(f"{file} cannot be read: {error}; {REMEDY}") from error


def data_state_for(ranks: list[dict[str, bytes]], rank: int, world_size: int) -> Any:
    """The data loader's state for `rank` of `world_size`.

    Raises:
        CheckpointError: the number of ranks changed, and the states of the old ranks are not one and the same.
    """
    states = [entry["dataloader"] for entry in ranks]
    if world_size == len(states):
        return unpack(states[rank])
    if len(set(states)) > 1:
        raise CheckpointError(
            f"this dataset's position is kept per rank and was saved on {len(states)} ranks, not {world_size}; "
            'resume on as many, or put "dataloader" into checkpoint.exclude_from_loading to start the data anew'
        )
    return unpack(states[0])


def capture_rng() -> dict[str, Any]:
    """The states of all generators of this process: python, numpy, torch on the CPU and on the current GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(ranks: list[dict[str, bytes]], rank: int, world_size: int, step: int) -> None:
    """Give this process its generators' states back; where they do not fit, seed anew from (seed, rank, step)."""
    if len(ranks) != world_size:
        info_once(f"random numbers: saved on {len(ranks)} ranks, now {world_size}; seeded anew from (seed, rank, step)")
        return reseed(rank, step)
    state = unpack(ranks[rank]["rng"])
    if (state["cuda"] is None) != (not torch.cuda.is_available()):
        info_once("random numbers: saved on another kind of device; seeded anew from (seed, rank, step)")
        return reseed(rank, step)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    return None


def reseed(rank: int, step: int) -> None:
    """Seed every generator from (the seed torch was given when the run was built, rank, step)."""
    digest = hashlib.blake2b(f"{torch.initial_seed()}/{rank}/{step}".encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the GPUs' generators too
