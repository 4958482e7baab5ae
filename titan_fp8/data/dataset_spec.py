"""What `training.dataset` and `validation.dataset` name, worked out before anything is opened.

A name and a path become a `DatasetSpec`: one of four kinds of source, which part of it, and where it is. The rules of
what validation reads when nothing is said, and that it never reads what training reads, are all here.

| `training.dataset` | validation by default |
|---|---|
| `synthetic`, `c4_test` | stories that training never sees |
| `text` | the files named `validation*`, else each n-th document |
| `tokens` | the validation split that `titan-fp8 prepare` made by the same rule |
| `c4` | `c4_validation` |
| `hf:<name>` | the data set's own split `validation` |
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from titan_fp8.config.text import show
from titan_fp8.data.config import DATASETS, HUB_PREFIX, TrainingSection, ValidationSection
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import nearest

Split = Literal["train", "validation"]

HOLD_OUT_EVERY = 100
"""Of local text, each document with a number divisible by this is held out, unless the job says otherwise."""


@dataclass(frozen=True)
class DatasetSpec:
    """A source of data.

    Attributes:
        kind: which source.
        name: as the user wrote it.
        split: `train`, or `validation` for the part that training never reads.
        path: file or folder (`text`, `tokens`), or what stands in for the hub's name (`stream`).
        config: the hub's configuration of the data set, such as `en`.
        own_path: the path was given for validation alone, so all of it may be read.
    """

    kind: Literal["synthetic", "text", "tokens", "stream"]
    name: str
    split: Split
    path: str | None = None
    config: str | None = None
    own_path: bool = False


def training_spec(training: TrainingSection) -> DatasetSpec:
    """The source to train on.

    Raises:
        UserError: an unknown name, a path that is missing, or one that the source has no use for.
    """
    spec = _parse(training.dataset, training.dataset_path, "training")
    if training.hold_out_every is not None and spec.kind != "text":
        raise UserError(
            f"training.hold_out_every = {training.hold_out_every} is for text, but training.dataset is "
            f"{show(spec.name)}; leave it out (for tokens it is an option of `titan-fp8 prepare`)"
        )
    return spec


def validation_spec(validation: ValidationSection, training: TrainingSection) -> DatasetSpec:
    """The source to validate on: what the section names, or the held-out part of the training source.

    Raises:
        UserError: as `training_spec`, or the source is the one that is trained on and has no held-out part.
    """
    trained = training_spec(training)
    if validation.dataset is None and validation.dataset_path is None:
        return _held_out(trained)
    name = validation.dataset or training.dataset
    path = validation.dataset_path
    if path is None and name in ("text", "tokens") and trained.kind == name:
        return _held_out(trained)
    spec = _parse(name, path, "validation")
    if spec.kind == "synthetic":
        return replace(spec, split="validation")
    if spec.kind == "stream":
        if name.startswith(HUB_PREFIX):
            spec = replace(spec, split="validation")
        if spec == replace(trained, name=spec.name):
            raise UserError(f"validation.dataset = {show(name)} is what training reads; name another one")
        return spec
    if trained.kind == spec.kind and _same_path(spec.path, trained.path):
        return _held_out(trained)
    return replace(spec, split="validation", own_path=True)


def _held_out(trained: DatasetSpec) -> DatasetSpec:
    if trained.kind == "stream" and trained.split == "validation":
        raise UserError(
            f"training.dataset = {show(trained.name)} is itself a validation split, so none is left to validate on; "
            "name one in validation.dataset"
        )
    return replace(trained, split="validation")


def _parse(name: str, path: str | None, section: str) -> DatasetSpec:
    if name.startswith(HUB_PREFIX):
        repository, _, config = name.removeprefix(HUB_PREFIX).partition(":")
        if not repository:
            raise UserError(f'{section}.dataset = {show(name)} names no data set; write "hf:owner/name[:config]"')
        return DatasetSpec("stream", name, "train", path or repository, config or None)
    if name not in DATASETS:
        close = nearest(name, DATASETS)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise UserError(f"{section}.dataset = {show(name)}: not one of {', '.join(DATASETS)}, {HUB_PREFIX}<name>{hint}")
    if name in ("c4", "c4_validation"):
        return DatasetSpec("stream", name, "train" if name == "c4" else "validation", path or "allenai/c4", "en")
    if name == "synthetic" or (name == "c4_test" and path is None):
        if path is not None:
            raise UserError(
                f"{section}.dataset_path = {show(path)} has no use with {section}.dataset = {show(name)}; "
                'set dataset = "text" to read it, or leave the path out'
            )
        return DatasetSpec("synthetic", name, "train")
    if path is None:
        raise UserError(f"{section}.dataset = {show(name)} needs {section}.dataset_path")
    if not Path(path).expanduser().exists():
        raise UserError(f"{section}.dataset_path = {show(path)} does not exist")
    kind = "tokens" if name == "tokens" else "text"
    return DatasetSpec(kind, name, "train", str(Path(path).expanduser()))


def _same_path(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
