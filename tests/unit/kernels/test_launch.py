"""The fast launchers: they pick the variant that Triton would, for every way in which variants differ, and a planned
launch that was made before does what the first one did."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from titan_fp8.kernels import launch  # noqa: E402

STREAM = 17


class Compiled:
    """A compiled kernel; `launches` gets itself, the grid and the arguments of each run."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches
        self.function, self.packed_metadata = 5, (4, 1, 0)

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        assert (stream, function, metadata, rest[:3]) == (STREAM, self.function, self.packed_metadata, (None,) * 3)
        self.launches.append((self, (x, y, z), rest[3:]))


class Kernel:
    """In place of a Triton kernel: `params` as it has them; each call by the slow way compiles a new variant, and is in
    `slow` with its arguments."""

    class Param:
        def __init__(self, name: str, is_constexpr: bool = False, do_not_specialize: bool = False) -> None:
            self.name, self.is_constexpr, self.do_not_specialize = name, is_constexpr, do_not_specialize

    def __init__(self) -> None:
        plain = self.Param("tokens", do_not_specialize=True)
        self.params = [self.Param("x"), plain, self.Param("features"), self.Param("BLOCK", is_constexpr=True)]
        self.compiled: list[Compiled] = []
        self.launches: list[Any] = []
        self.slow: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_and_run(*args: Any, **constants: Any) -> Compiled:
            self.slow.append((grid, args, constants))
            self.compiled.append(Compiled(self.launches))
            return self.compiled[-1]

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "_current_device", lambda: -1)  # what a CPU tensor answers
    monkeypatch.setattr(launch, "_current_stream", lambda device: STREAM)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    return Kernel()


X = torch.zeros(64)
UNALIGNED = torch.zeros(64)[1:]


def test_a_second_launch_reuses_the_variant_and_passes_constants_in_their_places(kernel: Kernel) -> None:
    for _ in range(3):
        launch.fast(kernel)[(7,)](X, 5, 32, BLOCK=128, num_warps=4)
    assert len(kernel.compiled) == 1
    assert [launched[1:] for launched in kernel.launches] == [((7, 1, 1), (X.data_ptr(), 5, 32, 128))] * 2


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


class Planner:
    """A planned launch of `kernel` for a number of tokens and of warps; `calls` has what was planned."""

    def __init__(self, kernel: Kernel) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.launch = launch.planned(kernel)(self.plan)

    def plan(self, device: int, tokens: int, warps: int) -> launch.Plan:
        self.calls.append((device, tokens, warps))
        return launch.Plan(launch.cdiv(tokens, 4), (tokens, 32), {"BLOCK": 128, "num_warps": warps})


@pytest.fixture
def planner(kernel: Kernel) -> Planner:
    return Planner(kernel)


def test_a_planned_launch_is_planned_and_compiled_once_and_then_runs_with_the_pointers_of_the_day(
    kernel: Kernel, planner: Planner
) -> None:
    others = [torch.zeros(64) for _ in range(2)]
    for x in (X, *others):
        planner.launch((x,), 10, 4)
    assert planner.calls == [(-1, 10, 4)]
    ((grid, args, constants),) = kernel.slow
    assert (grid, args, constants) == ((3,), (X, 10, 32), {"BLOCK": 128, "num_warps": 4})
    compiled = kernel.compiled[0]
    assert kernel.launches == [(compiled, (3, 1, 1), (x.data_ptr(), 10, 32, 128)) for x in others]


def test_a_new_key_is_planned_and_compiles_only_what_triton_would(kernel: Kernel, planner: Planner) -> None:
    planner.launch((X,), 10, 4)
    planner.launch((X,), 11, 4)  # tokens are not specialized on
    assert (len(planner.calls), len(kernel.compiled)) == (2, 1)
    assert kernel.launches == [(kernel.compiled[0], (3, 1, 1), (X.data_ptr(), 11, 32, 128))]
    planner.launch((X,), 10, 8)
    assert (len(planner.calls), len(kernel.compiled)) == (3, 2)


def test_memory_that_is_not_aligned_takes_a_variant_of_its_own_with_the_same_key(
    kernel: Kernel, planner: Planner
) -> None:
    for x in (X, UNALIGNED, X, UNALIGNED):
        planner.launch((x,), 10, 4)
    aligned, unaligned = kernel.compiled
    assert [(launched[0], launched[2][0]) for launched in kernel.launches] == [
        (aligned, X.data_ptr()),
        (unaligned, UNALIGNED.data_ptr()),
    ]


def test_which_of_the_tensors_is_not_aligned_matters(kernel: Kernel) -> None:
    kernel.params.insert(0, kernel.Param("y"))
    planner = Planner(kernel)
    for tensors in ((X, UNALIGNED), (UNALIGNED, X), (UNALIGNED, UNALIGNED), (X, X)):
        planner.launch(tensors, 10, 4)
    assert len(kernel.compiled) == 4


def test_float8_tensors_are_bytes_to_the_compiler(kernel: Kernel, planner: Planner) -> None:
    codes = torch.zeros(4, 16, dtype=torch.float8_e4m3fn)
    planner.launch((codes,), 10, 4)
    planner.launch((codes,), 10, 4)
    passed = kernel.slow[0][1][0]
    assert (passed.dtype, passed.data_ptr()) == (torch.uint8, codes.data_ptr())
    assert kernel.launches[0][2][0] == codes.data_ptr()


def test_plans_are_forgotten_when_there_are_too_many(
    kernel: Kernel, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAX_PLANS", 3)
    for tokens in (*range(1, 11), 10):
        planner.launch((X,), tokens, 4)
        assert len(planner.launch._ready) <= 3  # pyright: ignore[reportFunctionMemberAccess]
    assert len(planner.calls) == 10
    assert len(kernel.compiled) == 1


@pytest.mark.parametrize("by_plan", [False, True])
def test_a_launch_for_another_device_than_the_current_one_happens_there(
    kernel: Kernel, planner: Planner, by_plan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, streams_of = [0], []

    @contextlib.contextmanager
    def switched(device: int) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    def stream(device: int) -> int:
        streams_of.append((device, current[0]))
        return STREAM

    monkeypatch.setattr(launch, "_current_device", lambda: current[0])
    monkeypatch.setattr(launch, "_current_stream", stream)
    monkeypatch.setattr(torch.cuda, "device", switched)
    for _ in range(2):
        if by_plan:
            planner.launch((X,), 10, 4)
        else:
            launch.fast(kernel)[(1,)](X, 5, 32, BLOCK=128, num_warps=4)
    assert len(kernel.launches) == 1
    assert streams_of == [(-1, -1)]
    assert current == [0]


@pytest.mark.parametrize("by_plan", [False, True])
def test_each_device_has_a_compiled_kernel_of_its_own(
    kernel: Kernel, planner: Planner, by_plan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle of one is worth nothing on another device."""
    current = [0]

    class OnCurrentDevice(torch.Tensor):
        def get_device(self) -> int:
            return current[0]

    monkeypatch.setattr(launch, "_current_device", lambda: current[0])
    for device in (0, 1, 0, 1):
        current[0] = device
        x = X.as_subclass(OnCurrentDevice)
        if by_plan:
            planner.launch((x,), 10, 4)
        else:
            launch.fast(kernel)[(1,)](x, 5, 32, BLOCK=128, num_warps=4)
    assert len(kernel.compiled) == 2
    assert [launched[0] for launched in kernel.launches] == kernel.compiled


def test_in_the_interpreter_every_launch_goes_through_triton(
    kernel: Kernel, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "_current_device", lambda: pytest.fail("there need not be a GPU"))
    for _ in range(2):
        planner.launch((X,), 10, 4)
    assert [grid for grid, _, _ in kernel.slow] == [(3,), (3,)]
    assert kernel.launches == []


@pytest.mark.parametrize("n", [1, 2, 3, 4, 127, 128, 129, 4096, 4097])
def test_host_arithmetic_is_that_of_triton(n: int) -> None:
    assert launch.next_power_of_2(n) == triton.next_power_of_2(n)
    assert launch.cdiv(n, 16) == triton.cdiv(n, 16)


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the default stream, with no zeros left."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_current_stream", lambda device: 0)
    launch._zeros_left.cache_clear()
    yield
    launch._zeros_left.cache_clear()


@pytest.mark.usefixtures("pooled")
@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 600), (1, 600), (24, 600), (30, 600), (launch.MAX_ZEROS // 4, 6), (launch.MAX_ZEROS + 1, 2)],
)
def test_zeros_are_zero_and_nobody_gets_one_twice(size: int, count: int) -> None:
    taken = []
    for _ in range(count):
        tensor = launch.zeros(X, size)
        assert tensor.shape == ((size,) if size else ())
        assert (tensor == 0).all()
        tensor.fill_(1)
        taken.append(tensor)
    addresses = sorted(tensor.data_ptr() for tensor in taken)
    # Views of few allocations, all alive: none may reach into the next.
    assert all(second - first >= max(4 * size, 16) for first, second in itertools.pairwise(addresses))
    assert len({address % 16 for address in addresses}) == 1


@pytest.mark.usefixtures("pooled")
def test_zeros_are_made_one_by_one_on_a_stream_that_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.zeros(X, 3)
    left = len(launch._zeros_left(-1, 3))
    monkeypatch.setattr(launch, "_current_stream", lambda device: STREAM)
    assert launch.zeros(X, 3).tolist() == [0, 0, 0]
    assert launch.zeros(X).item() == 0
    assert (len(launch._zeros_left(-1, 3)), len(launch._zeros_left(-1, 0))) == (left, 0)


@pytest.mark.usefixtures("pooled")
def test_zeros_taken_first_in_inference_mode_can_be_saved_for_backward() -> None:
    with torch.inference_mode():
        launch.zeros(X)
    assert not launch.zeros(X).is_inference()
