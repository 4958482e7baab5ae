"""Checkpoint folders on disk: when one counts, how one comes to be, which ones go.

    checkpoint/
        step-500/
            .metadata, __0_0.distcp, __1_0.distcp ...   tensors (torch.distributed.checkpoint), one file a rank
            host_state.pt                               everything that is not a tensor of model or optimizer
            manifest.json                               what this is, and every file with its size
        step-1000.incomplete/                           being written, or left behind by a run that was killed

A folder counts when its name is `step-N` and every file of its manifest is there with its size. Both hold from one
moment to the next: all files are written and flushed under another name, the manifest last, and then the folder is
renamed, which a file system does whole or not at all. So a full disk or a kill at any time leaves what was there
before.

If `step-N` exists already (a run went back to an earlier step), the old folder steps aside as `step-N.replaced` for the
moment between two renames; `recover` puts it back if the process died in that moment.

Nothing here knows torch, and nothing here is called by more than one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from titan_fp8.runtime.errors import UserError

Kind = Literal["full", "model", "seed"]

MANIFEST_NAME = "manifest.json"
METADATA_NAME = ".metadata"  # torch.distributed.checkpoint's
INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
REMEDY = "restore it, or remove that step's folder to go on from an earlier checkpoint"  # for a damaged file
_FORMAT = 1
_STEP = re.compile(r"step-(0|[1-9]\d*)")


class CheckpointError(UserError):
    """A checkpoint could not be written, read or used; what was saved before is untouched."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes:
        kind: `full` (everything a run needs to go on), `model` (weights only) or `seed` (weights before step 1).
        step: optimizer steps done.
        world_size: processes that wrote it.
        fingerprint: the run's description, compared when it is loaded.
        versions: versions of the software that wrote it.
        saved_at_unix_s: when the last file was complete, in seconds since 1970; grows from save to save.
        files: size in bytes of every file but the manifest.
        left_out: entries of `checkpoint.exclude_from_loading` that meant parameters which the model does not have, only
            the checkpoint that the run began with.
    """

    kind: Kind
    step: int
    world_size: int
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    saved_at_unix_s: float
    files: dict[str, int]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return folder / f"step-{step}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name, None for any other name (`step-5.incomplete` too)."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def complete_checkpoints(folder: Path) -> list[Saved]:
    """The complete checkpoints in `folder`, by step; an absent folder holds none."""
    candidates = [path for path in _children(folder) if step_of(path) is not None]
    saved = [Saved(path, read_manifest(path)) for path in candidates if fault_of(path) is None]
    return sorted(saved, key=lambda entry: entry.manifest.step)


def by_age(saved: Sequence[Saved]) -> list[Saved]:
    """Checkpoints in the order in which they were saved, which is not that of steps after a run went back."""
    return sorted(saved, key=lambda entry: entry.manifest.saved_at_unix_s)


def time_after_all(folder: Path) -> float:
    """The time in seconds since 1970, or just after the last checkpoint's in `folder` where this clock is behind."""
    saved = by_age(complete_checkpoints(folder))
    return max(time.time(), saved[-1].manifest.saved_at_unix_s + 0.001) if saved else time.time()


def faulty_checkpoints(folder: Path) -> dict[Path, str]:
    """The `step-N` folders that do not count, each with the reason."""
    faults = {path: fault_of(path) for path in _children(folder) if step_of(path) is not None}
    return {path: fault for path, fault in sorted(faults.items()) if fault is not None}


def fault_of(path: Path) -> str | None:
    """Why the folder `path` is no complete checkpoint; None when it is one."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, size in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = path / MANIFEST_NAME
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != _FORMAT:
            raise CheckpointError(f"{file} has a format that this version does not know")
        manifest = Manifest(**content)
        if not isinstance(manifest.files, dict) or not isinstance(manifest.step, int):
            raise TypeError("its entries are not what they should be")
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def recover(folder: Path) -> None:
    """Put back checkpoints that a killed process had moved aside to replace them."""
    for aside, original in recoverable(folder).items():
        aside.rename(original)


def recoverable(folder: Path) -> dict[Path, Path]:
    """What `recover` would rename: the folder that was moved aside -> its own name."""
    asides = [path for path in _children(folder) if path.name.endswith(REPLACED)]
    names = {aside: aside.with_name(aside.name.removesuffix(REPLACED)) for aside in asides}
    return {aside: name for aside, name in names.items() if step_of(name) is not None and not name.exists()}


def begin(folder: Path, step: int) -> Path:
    """Make the folder in which the checkpoint of `step` is written, and clear what earlier runs left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for leftover in _children(folder):
        if leftover.name.endswith((INCOMPLETE, REPLACED)) and leftover.name.startswith("step-"):
            shutil.rmtree(leftover)
    path = folder / f"step-{step}{INCOMPLETE}"
    path.mkdir()
    return path


def commit(incomplete: Path, manifest: Manifest) -> Path:
    """Make a written folder count: write the manifest, flush, rename. Returns the final path."""
    content = {"format": _FORMAT, **asdict(manifest)}
    if not manifest.left_out:
        del content["left_out"]  # versions that do not know the entry read all checkpoints without it
    _write_flushed(incomplete / MANIFEST_NAME, json.dumps(content, indent=2))
    _flush_folder(incomplete)
    final = step_folder(incomplete.parent, manifest.step)
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(aside)
    incomplete.rename(final)
    _flush_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def abandon(incomplete: Path) -> None:
    """Free the space of a folder that will not be finished."""
    shutil.rmtree(incomplete, ignore_errors=True)


def purge(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` checkpoints written last, and return what was deleted.

    The newest full checkpoint always stays: it is what the run can resume from. `keep = 0` keeps all.
    """
    if keep == 0:
        return []
    saved = by_age(complete_checkpoints(folder))
    keepers = saved[-keep:] + [entry for entry in saved if entry.manifest.kind == "full"][-1:]
    doomed = [entry.path for entry in saved if entry not in keepers]
    for path in doomed:
        # Half deleted, it would be a faulty checkpoint under its own name; under this one, the next save clears it.
        dying = path.with_name(path.name + INCOMPLETE)
        path.rename(dying)
        shutil.rmtree(dying, ignore_errors=True)
    return doomed


def sizes(path: Path) -> dict[str, int]:
    """Size in bytes of every file directly in `path`."""
    return {file.name: file.stat().st_size for file in sorted(path.iterdir())}


def describe(saved: Sequence[Saved]) -> str:
    """`step-5 (full), step-10 (model)`, or `none`."""
    return ", ".join(f"{entry.path.name} ({entry.manifest.kind})" for entry in saved) or "none"


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _write_flushed(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    """Flush a folder's list of names: fsync of a file does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
