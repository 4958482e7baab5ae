"""The fast launcher: it picks the variant that Triton would, for every way in which variants differ."""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from titan_fp8.kernels import launch  # noqa: E402


class Compiled:
    """What a launch of a compiled kernel was given."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, stream: self.launches.append((self, grid, args))


class Kernel:
    """In place of a Triton kernel: `params` as it has them; each call by the slow way compiles a new variant."""

    class Param:
        def __init__(self, name: str, is_constexpr: bool = False, do_not_specialize: bool = False) -> None:
            self.name, self.is_constexpr, self.do_not_specialize = name, is_constexpr, do_not_specialize

    def __init__(self) -> None:
        plain = self.Param("tokens", do_not_specialize=True)
        self.params = [self.Param("x"), plain, self.Param("features"), self.Param("BLOCK", is_constexpr=True)]
        self.compiled: list[Compiled] = []
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_and_run(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled(self.launches))
            return self.compiled[-1]

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "_current_device", lambda: -1)  # what a CPU tensor answers
    monkeypatch.setattr(launch, "_current_stream", lambda device: 0)
    return Kernel()


X = torch.zeros(64)
UNALIGNED = torch.zeros(64)[1:]


def test_a_second_launch_reuses_the_variant_and_passes_constants_in_their_places(kernel: Kernel) -> None:
    for _ in range(3):
        launch.fast(kernel)[(7,)](X, 5, 32, BLOCK=128, num_warps=4)
    assert len(kernel.compiled) == 1
    assert [(grid, args[1:]) for _, grid, args in kernel.launches] == [((7, 1, 1), (5, 32, 128))] * 2


@pytest.mark.parametrize(
    ("args", "constants", "variants"),
    [
        ((UNALIGNED, 5, 32), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X.double(), 5, 32), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X, 5, 1), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X, 5, 33), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X, 5, 2**32), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X, 2**32, 32), {"BLOCK": 128, "num_warps": 4}, 2),
        ((X, 5, 32), {"BLOCK": 64, "num_warps": 4}, 2),
        ((X, 5, 32), {"BLOCK": 128, "num_warps": 8}, 2),
        ((X, 16, 32), {"BLOCK": 128, "num_warps": 4}, 1),
        ((X, 1, 48), {"BLOCK": 128, "num_warps": 4}, 1),
    ],
)
def test_what_a_variant_depends_on_gets_a_variant_and_nothing_else_does(
    kernel: Kernel, args: tuple, constants: dict, variants: int
) -> None:
    launch.fast(kernel)[(1,)](X, 5, 32, BLOCK=128, num_warps=4)
    launch.fast(kernel)[(1,)](*args, **constants)
    assert len(kernel.compiled) == variants


@pytest.mark.parametrize("n", [1, 2, 3, 4, 127, 128, 129, 4096, 4097])
def test_host_arithmetic_is_that_of_triton(n: int) -> None:
    assert launch.next_power_of_2(n) == triton.next_power_of_2(n)
    assert launch.cdiv(n, 16) == triton.cdiv(n, 16)


def test_zeros_are_zero_and_nobody_gets_one_twice() -> None:
    pool = launch._Zeros(torch.device("cpu"))
    taken = []
    for _ in range(launch._Zeros.COUNT):
        number = pool.take()
        assert number.item() == 0
        number.fill_(1)
        taken.append(number)
    assert len({number.data_ptr() for number in taken}) == len(taken)
    assert all(number.data_ptr() % 16 == taken[0].data_ptr() % 16 for number in taken)


def test_zeros_taken_first_in_inference_mode_can_be_saved_for_backward() -> None:
    pool = launch._Zeros(torch.device("cpu"))
    with torch.inference_mode():
        pool.take()
    assert not pool.take().is_inference()
