"""Running cases in Triton's interpreter. Triton decides at import whether it interprets, so they run in a process of
their own: `results_of` starts it, and the module of the cases calls `main`."""

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter

from titan_fp8.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[3]


def results_of(module: str, folder: Path, timeout_s: float = 110, *, only: Sequence[str] = ()) -> dict[str, str | None]:
    """{case: "" or what is wrong, None if it was not run} of the cases of `tests.unit.kernels.MODULE`; `only`, if any
    are named, are run."""
    out = folder / "results.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.unit.kernels.{module}", str(out), *only]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


def selected_cases(request: pytest.FixtureRequest) -> list[str]:
    """The parameters `case` of the tests of the file that asks, as far as this run has them."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    return [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]


def cases_of(names: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """The functions of a module that are called `case_...`, without that beginning."""
    return {name.removeprefix("case_"): value for name, value in names.items() if name.startswith("case_")}


def replace_the_language_once() -> None:
    """Triton's interpreter replaces all functions of its language at a launch, and at each call of a device function
    from a kernel again, a third of its time: there they are replaced already."""
    replace: Callable[[Any], Any] = triton.runtime.interpreter._patch_lang

    @functools.cache
    def languages_of(function: Any) -> tuple[Any, ...]:
        return tuple(each for each in function.__globals__.values() if each is tl or each is tl.core)

    def replace_once(function: Any) -> Any:
        languages = languages_of(function)
        if not languages or any(tl.core.is_builtin(language.load) for language in languages):
            return replace(function)
        return None  # nothing to restore: only a launch does, and to it the language is always new

    triton.runtime.interpreter._patch_lang = replace_once


def remember_types() -> None:
    """Triton makes the type of each intermediate result, and what a tensor has of it, anew, a third to a half of the
    rest of the interpreter's time. Nothing changes them, so those of one name are made once."""
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    make_numpy = triton.runtime.interpreter._get_np_dtype  # and a table of all types, at each call
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    numpy: dict[str, Any] = {}

    def block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def numpy_of(type: tl.dtype) -> Any:
        if type.name not in numpy:
            numpy[type.name] = make_numpy(type)
        return numpy[type.name]

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    triton.runtime.interpreter._get_np_dtype = numpy_of


def main(cases: dict[str, Callable[[], str]], shrink_blocks: Callable[[], None]) -> None:
    """Run all cases, or those that the command line names behind a file, after `shrink_blocks`, and write what is wrong
    to that file."""
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    replace_the_language_once()
    remember_types()
    shrink_blocks()
    out, *only = sys.argv[1:]
    results: dict[str, str | None] = dict.fromkeys(cases)
    for name in only or cases:
        try:
            results[name] = cases[name]().strip("; ")
        except Exception:
            results[name] = traceback.format_exc()
    Path(out).write_text(json.dumps(results))
