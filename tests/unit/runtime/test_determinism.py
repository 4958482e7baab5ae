"""Seeds and deterministic algorithms."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

from titan_fp8.runtime.config import DebugSection
from titan_fp8.runtime.determinism import set_seed, use_deterministic_algorithms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is put back whatever happens
        monkeypatch.delenv(name)
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    state, torch_state = random.getstate(), torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    random.setstate(state)
    torch.set_rng_state(torch_state)


def _draws() -> tuple[float, float]:
    return random.random(), torch.rand(()).item()


def test_a_seed_repeats_every_generator() -> None:
    assert set_seed(DebugSection(seed=11), CPU) == 11
    first = _draws()
    set_seed(DebugSection(seed=11), CPU)
    assert _draws() == first
    set_seed(DebugSection(seed=12), CPU)
    assert _draws() != first


def test_the_largest_seed_is_taken() -> None:
    assert set_seed(DebugSection(seed=2**63 - 1), CPU) == 2**63 - 1


def test_without_a_seed_one_is_drawn_and_repeats_the_run() -> None:
    seed = set_seed(DebugSection(), CPU)
    draws = _draws()
    assert set_seed(DebugSection(), CPU) != seed
    set_seed(DebugSection(seed=seed), CPU)
    assert _draws() == draws


def test_determinism_is_off_by_default() -> None:
    use_deterministic_algorithms(DebugSection())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_asks_torch_cudnn_cublas_and_the_compiler(warn_only: bool) -> None:
    use_deterministic_algorithms(DebugSection(deterministic=True, deterministic_warn_only=warn_only))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"


def test_a_workspace_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms(DebugSection(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
