"""Local text: txt, json, jsonl, parquet and arrow files as one numbered list of documents.

Reading goes through the `datasets` library, which converts the files once into Arrow tables in its cache
(`HF_DATASETS_CACHE`, by default `~/.cache/huggingface/datasets`) and maps them into memory from then on: any document
is a page fault away, and several processes share one copy. Nothing is asked of the network.

A document is a row's `text`, and a line, a paragraph or a whole file of txt. Empty ones are left out before
numbering. Validation takes the files named `validation*` if a folder has any, and otherwise each `hold_out_every`-th
document; training never reads those, whether validation is enabled or not, so that turning it on in a resumed run
measures what it seems to measure.
"""

import bisect
import contextlib
import errno
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from titan_fp8.data.dataset_spec import HOLD_OUT_EVERY, Split
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import info_once

TxtDocuments = Literal["line", "paragraph", "file"]

_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSIBLE = ("text", "json")
_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}  # beside the tables of `Dataset.save_to_disk`
_MANIFEST = "manifest.json"
_JSON_START = 12 << 20  # bytes; `datasets` takes the columns from the first 10 MiB


class TextDocuments:
    """A list of non-empty texts: one split of some files. Can be pickled; the tables stay on disk.

    Attributes:
        held_out: documents that are kept from training by their number.
        total_bytes: of UTF-8, over both sides of that division.
    """

    def __init__(self, files: Sequence[str], every: int, split: Split) -> None:
        """
        Args:
            files: Arrow streams with a column `text`.
            every: each `every`-th document is held out; 0 if none is.
            split: which side of that division this is. With `every` 0 it has no effect.
        """
        self._files = tuple(files)
        self._every = every
        self._split = split
        self._columns = [_text_column(file) for file in self._files]
        sizes = np.concatenate([np.zeros(0, dtype=np.int64), *map(_text_sizes, self._columns)])
        self._rows = None if sizes.all() else np.flatnonzero(sizes)  # which rows are not empty; None: all of them
        self._ends = list(itertools.accumulate(len(column) for column in self._columns))
        documents = int(np.count_nonzero(sizes))
        self.total_bytes = int(sizes.sum())
        self.held_out = documents // every if every else 0
        self._count = self.held_out if every and split == "validation" else documents - self.held_out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}  # mapped again, not copied, in another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _columns=[_text_column(file) for file in state["_files"]])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._every:
            if self._split == "validation":
                index = index * self._every + self._every - 1
            else:
                index += index // (self._every - 1)
        row = index if self._rows is None else int(self._rows[index])
        table = bisect.bisect_right(self._ends, row)
        return self._columns[table][row - (self._ends[table - 1] if table else 0)].as_py()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(self._count))


@dataclass(frozen=True)
class TextFiles:
    """The data files below a path, by split and in reading order."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]


def find_text_files(path: Path) -> TextFiles:
    """The files to read at `path`: the file itself, or those of a known kind in a folder and its folders, by name.

    Raises:
        UserError: a path that does not exist, a file of an unknown kind, or a folder without any that is known.
    """
    kinds = ", ".join([*_KINDS, ".json.gz"])
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        if _kind(path) is None:
            raise UserError(f"{path} is of no kind that can be read as text ({kinds})")
        return TextFiles((path,), ())
    if (path / _MANIFEST).is_file() and any(path.glob("*.bin")):
        raise UserError(f'{path} holds token shards; set training.dataset = "tokens" to read them')
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and _kind(file) is not None
        and file.name not in _METADATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"{path} holds no data files ({kinds})")
    held_out = tuple(file for file in files if file.name.startswith("validation"))
    return TextFiles(tuple(file for file in files if file not in held_out), held_out)


def load_text(
    path: Path,
    split: Split,
    *,
    hold_out_every: int | None = None,
    txt_documents: TxtDocuments = "line",
    whole: bool = False,
) -> TextDocuments:
    """One split of the text at `path`.

    Args:
        path: file or folder.
        split: `train` or `validation`.
        hold_out_every: of the documents, each n-th is held out; 0 for none, None for the default of 100. A folder
            with files named `validation*` has its split already.
        txt_documents: what of a txt file is one document.
        whole: nothing else reads this path, so without `validation*` files `validation` is all of it.

    Raises:
        UserError: nothing to read, a file that cannot be read, no column `text`, or an empty split.
    """
    chosen, every = _files_of_split(path, split, hold_out_every, whole)
    tables = [_arrow_files(kind, group, txt_documents) for kind, group in _by_kind(chosen)]
    documents = TextDocuments([file for table in tables for file in table], every, split)
    if not len(documents):
        if documents.total_bytes:
            raise UserError(
                f"{path} has fewer than {every} documents, too few to hold out each {every}th for validation; "
                "lower training.hold_out_every, add a file named validation*, or set validation.dataset_path"
            )
        raise _empty(path, chosen)
    return documents


def check_text(
    path: Path,
    split: Split,
    *,
    hold_out_every: int | None = None,
    txt_documents: TxtDocuments = "line",
    whole: bool = False,
) -> None:
    """Refuse what `load_text` would refuse, as far as names, sizes and the first file of each kind tell at once.

    Converts nothing. The arguments are those of `load_text`; `txt_documents` makes no difference here.

    Raises:
        UserError: nothing to read, only empty files, or a file without a column `text`.
    """
    chosen, _ = _files_of_split(path, split, hold_out_every, whole)
    groups = list(_by_kind(chosen))
    if not groups:
        raise _empty(path, chosen)
    for kind, files in groups:
        if _surely_without_text(kind, Path(files[0])):
            raise UserError(f'{files[0]}: no column "text"; rename the column that holds the documents')


def _empty(path: Path, files: tuple[Path, ...]) -> UserError:
    return UserError(f"{path} is empty: no text in {len(files)} file(s), the first being {files[0].name}")


def _surely_without_text(kind: str, file: Path) -> bool:
    """Whether the file has no column `text`; False also where that is not known without reading all of it."""
    if kind == "json" and file.suffix.lower() != ".gz":
        with file.open("rb") as stream:
            start = stream.read(_JSON_START)
            whole = not stream.read(1)
        # The rows of a long file of lines are read in pieces, and the first piece decides which columns there are.
        lines = start.startswith(b"{") and start.partition(b"\n")[0].rstrip().endswith(b"}")
        objects = start.lstrip()[:1] == b"{" or start.lstrip().removeprefix(b"[").lstrip()[:1] == b"{"  # not strings
        return (whole or lines) and objects and b'"text"' not in start and b"\\u" not in start
    if kind == "parquet":
        import pyarrow.parquet

        try:
            return "text" not in pyarrow.parquet.read_schema(file).names
        except (OSError, ValueError):  # what is wrong with the file is found and said when it is read
            return False
    return False


def _files_of_split(path: Path, split: Split, hold_out_every: int | None, whole: bool) -> tuple[tuple[Path, ...], int]:
    """The files of a split (at least one), and which of their documents are held out: each so-many-th, 0 for none."""
    files = find_text_files(path)
    if files.validation and hold_out_every:
        raise UserError(
            f"hold_out_every = {hold_out_every}, but {path} holds its validation split in files "
            f"({files.validation[0].name}); leave hold_out_every out or move those files"
        )
    every = 0
    chosen = files.train
    if split == "validation" and files.validation:
        chosen = files.validation
    elif not files.validation and not (split == "validation" and whole):
        every = HOLD_OUT_EVERY if hold_out_every is None else hold_out_every
        if split == "validation" and every == 0:
            raise UserError(f"{path}: hold_out_every = 0 leaves nothing to validate on; set validation.dataset_path")
    if every == 1 or every < 0:
        raise UserError(f"hold_out_every = {every}: give 0 (none) or 2 and more; 1 would hold out every document")
    if not chosen:
        raise UserError(f"{path} holds only validation files, so there is nothing to train on")
    return chosen, every


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in _COMPRESSIBLE else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _by_kind(files: tuple[Path, ...]) -> Iterator[tuple[str, list[str]]]:
    for kind in dict.fromkeys(_KINDS.values()):
        group = [str(file) for file in files if _kind(file) == kind and file.stat().st_size]
        if group:
            yield kind, group


def _arrow_files(kind: str, files: list[str], txt_documents: TxtDocuments) -> list[str]:
    """Arrow streams with the rows of some files of one kind, in order, and a column `text` of strings."""
    import datasets.config

    info_once(f"reading {len(files)} {kind} file(s), first {files[0]} (cache: {datasets.config.HF_DATASETS_CACHE})")
    with quiet_datasets():
        try:
            table = _open(kind, files, txt_documents)
        except Exception as error:  # every reader has errors of its own; all mean that the files cannot be read
            _refuse_full_disk(error)
            file, cause = _culprit(kind, files, txt_documents, error)
            raise UserError(f"cannot read {file}: {_root_cause(cause)}") from error
    _check_text_column(table, files[0])
    return [entry["filename"] for entry in table.cache_files]


def _open(kind: str, files: list[Any], txt_documents: TxtDocuments) -> Any:
    import datasets
    import pyarrow

    if kind == "text":
        return datasets.Dataset.from_text(files, sample_by="document" if txt_documents == "file" else txt_documents)
    if kind == "json":
        return datasets.Dataset.from_json(files)
    if kind == "parquet":
        return datasets.Dataset.from_parquet(files)
    try:  # Arrow streams, as `datasets` writes them, are used in place
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    except (pyarrow.ArrowInvalid, OSError):  # Arrow's file format goes through the cache
        from datasets.packaged_modules.arrow.arrow import Arrow

        builder = Arrow(data_files={"train": files})
        builder.download_and_prepare()
        return builder.as_dataset(split="train")


def _culprit(kind: str, files: list[str], txt_documents: TxtDocuments, error: Exception) -> tuple[str, Exception]:
    """The first file that cannot be read by itself, and why; the first of all if each can."""
    for file in files if len(files) > 1 else ():
        try:
            _open(kind, [file], txt_documents)
        except Exception as single:  # as above
            return file, single
    return files[0], error


def _check_text_column(table: Any, file: str) -> None:
    if "text" not in table.column_names:
        columns = ", ".join(table.column_names) or "none"
        raise UserError(f'{file}: no column "text" (columns: {columns}); rename the column that holds the documents')
    type_name = str(getattr(table.features["text"], "dtype", table.features["text"]))
    if type_name == "null":
        raise UserError(f'{file}: the column "text" holds only empty values')
    if type_name not in ("string", "large_string", "string_view"):
        raise UserError(f'{file}: the column "text" is of type {type_name}, but a document is a string')


def _text_column(file: str) -> Any:
    """The column `text` of an Arrow stream, mapped into memory: a `pyarrow.ChunkedArray`."""
    import pyarrow

    with pyarrow.ipc.open_stream(pyarrow.memory_map(file)) as stream:
        return stream.read_all().column("text")


def _text_sizes(column: Any) -> np.ndarray:
    """Bytes of each text [rows] int64, from the offsets alone, so the text itself is not read."""
    import pyarrow.compute

    sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), 0)  # type: ignore[attr-defined]
    return sizes.to_numpy().astype(np.int64)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: what goes wrong is said once, by the exception."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _refuse_full_disk(error: BaseException) -> None:
    """Say so if it was the cache that could not be written, which is no fault of the files that were read."""
    import datasets.config

    causes = _causes(error)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        raise UserError(
            f"the disk of the cache {datasets.config.HF_DATASETS_CACHE} is full; "
            "free some space or set HF_DATASETS_CACHE to a folder on another disk"
        ) from error


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
