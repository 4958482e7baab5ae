"""The CUDA kernel of the transposed MXFP8 cast: what its threads compute, run on the CPU where nvcc is, equals the
reference bit for bit; and where it cannot be built or run it says so, and nothing stands in for it.

Code for the CPU has no `__CUDA_ARCH__`: what runs here of bf16 is the path one number at a time. That of pairs, PTX for
8.6 and later, is compiled here (`test_mx_compiles.py`, `test_mx_compiles_blackwell.py`) and run on GPUs alone
(`tests/gpu/test_mx.py`)."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.unit.kernels.test_mx_reference import values
from titan_fp8.kernels import mx
from titan_fp8.kernels.mx import columns_cuda, layout, reference
from titan_fp8.runtime.errors import UserError

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

Cast = Callable[[Tensor, str, bool], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    """The threads of the kernel one after the other, on CPU tensors."""
    library = tmp_path_factory.mktemp("cuda") / "columns.so"
    options = ["-shared", "-Xcompiler", "-fPIC", "-arch=sm_90", f"-I{columns_cuda.SOURCE.parent}", "-o", str(library)]
    source = Path(__file__).with_name("mx_columns_host.cu")
    subprocess.run([str(NVCC), *options, str(source)], check=True, capture_output=True, text=True, timeout=100)
    function = ctypes.CDLL(str(library)).cast_columns_on_host
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 3

    def run(x: Tensor, mode: str, swizzled: bool) -> tuple[Tensor, Tensor]:
        assert columns_cuda._has_whole_words(x)
        (tokens, features), poison = x.shape, 0x7F
        codes = torch.full((features, mx.padded(tokens)), poison, dtype=torch.uint8)
        blocks = mx.padded(tokens) // mx.BLOCK
        shape = layout.padded_shape(features, blocks) if swizzled else (blocks, features)
        scale = torch.zeros(shape, dtype=torch.uint8) if swizzled else torch.full(shape, poison, dtype=torch.uint8)
        pointers = x.data_ptr(), codes.data_ptr(), scale.data_ptr()
        carry, form = reference.CARRY[mode], columns_cuda.FORMATS[x.dtype]
        function(*pointers, tokens, features, x.stride(0), form, carry, swizzled)
        scale = scale.view(mx.E8M0)
        return codes.view(torch.float8_e4m3fn), scale if swizzled else scale.t()

    return run


def assert_equal(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert torch.equal(result.view(torch.uint8), wanted.view(torch.uint8))


@needs_nvcc
@pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])
@pytest.mark.parametrize("mode", mx.MODES)
@pytest.mark.parametrize("dtype", columns_cuda.FORMATS)
def test_the_threads_compute_the_reference(cast: Cast, dtype: torch.dtype, mode: str, swizzled: bool) -> None:
    for tokens, features in ((1, 32), (33, 96), (200, 160)):
        x = values(tokens, features).to(dtype)
        x[0, 2], x[tokens - 1, 5], x[tokens // 2, 9], x[0, 11] = torch.nan, -torch.inf, 0.0, torch.finfo(dtype).tiny / 4
        assert_equal(cast(x, mode, swizzled), mx.cast_columns(x, mode, swizzled=swizzled))


@needs_nvcc
def test_rows_may_be_apart(cast: Cast) -> None:
    base = values(50, 140).bfloat16()
    for x in (base[:, 2:66], base[::2, :64], base[:1, :32].expand(40, 32)):
        assert_equal(cast(x, "rceil", False), mx.cast_columns(x, "rceil"))


def test_inputs_without_whole_words_are_found() -> None:
    base = torch.zeros(8, 65, dtype=torch.bfloat16)
    assert columns_cuda._has_whole_words(base[::2, :64])
    for x in (base[:, :64], base[::2, 1:33], base.t()[:64]):
        assert not columns_cuda._has_whole_words(x)
    assert columns_cuda._has_whole_words(base.float()[:, 1:33])


def test_a_cpu_tensor_is_refused_by_the_cuda_kernel() -> None:
    with pytest.raises(UserError, match='this one is on cpu; choose "triton" or "torch"'):
        mx.cast_columns(torch.ones(32, 32), "floor", kernel="cuda")


def test_the_other_choices_give_the_reference_on_a_cpu() -> None:
    x = values(40, 64)
    for kernel in ("triton", "torch"):
        assert_equal(mx.cast_columns(x, "even", kernel=kernel), reference.cast_columns(x, "even"))


def test_the_package_has_the_source() -> None:
    assert columns_cuda.SOURCE.is_file()
    assert "kernels/mx/*.cu" in Path(__file__).parents[3].joinpath("pyproject.toml").read_text()


def fake_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, tools: list[str], load: Callable) -> SimpleNamespace:
    """`torch.utils.cpp_extension` with a toolkit in `folder`, and a PATH with nothing but these tools."""
    (folder / "bin").mkdir()
    for tool in tools:
        path = folder / "bin" / tool
        path.write_text("")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    extension = SimpleNamespace(CUDA_HOME=str(folder), load=load)
    monkeypatch.setattr(columns_cuda.importlib, "import_module", lambda name: extension)
    return extension


@pytest.mark.parametrize(
    ("tools", "missing"),
    [
        (["ninja", "c++"], r"missing here: nvcc \(CUDA_HOME\)\."),
        (["nvcc", "c++"], r"missing here: ninja\."),
        (["nvcc"], r"missing here: ninja, a C\+\+ compiler \(c\+\+\)\."),
    ],
)
def test_without_its_tools_the_kernel_says_how_to_build_it(
    tools: list[str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path, monkeypatch, tools, lambda *args, **options: pytest.fail("must not build"))
    with pytest.raises(UserError, match=missing) as error:
        columns_cuda.build()
    for remedy in (
        "CUDA toolkit of PyTorch's version (CUDA 13.0)",
        "CUDA_HOME",
        "pip install ninja",
        '"triton" or "torch"',
    ):
        assert remedy in str(error.value)


def test_without_a_toolkit_or_a_cuda_build_of_pytorch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    names = columns_cuda._missing_tools(None)
    assert "nvcc (CUDA_HOME)" in names
    assert "a CUDA build of PyTorch" in names


def test_a_build_that_fails_is_reported_with_the_other_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> str:
        raise RuntimeError("Error building extension: unsupported GNU version")

    fake_tools(tmp_path, monkeypatch, ["nvcc", "ninja", "c++"], load)
    with pytest.raises(UserError, match=r'"triton" or "torch".*unsupported GNU version'):
        columns_cuda.build()


def test_the_library_is_built_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, sources: list[str], **options: object) -> str:
        calls.append((sources, options["is_python_module"], options["with_cuda"]))
        return os.fspath(tmp_path / "library.so")

    fake_tools(tmp_path, monkeypatch, ["nvcc", "ninja", "c++"], load)
    assert columns_cuda.build() == str(tmp_path / "library.so")
    assert calls == [([str(columns_cuda.SOURCE)], False, True)]
