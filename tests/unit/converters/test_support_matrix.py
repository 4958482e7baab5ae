"""The table of devices in docs/float8.md says what the code does."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from titan_fp8.converters import support
from titan_fp8.converters.support import (
    resolve_emulation,
    resolve_grouped_emulation,
    resolve_kernels,
    why_not_native,
)
from titan_fp8.quantization.recipes import RECIPES, get_recipe
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

DOC = Path(__file__).parents[3] / "docs" / "float8.md"
CPU = DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
NEWEST = (13, 0)


def capabilities(column: str, cuda: tuple[int, int] = NEWEST) -> DeviceCapabilities:
    if column == "CPU":
        return CPU
    if column == "ROCm":
        return DeviceCapabilities("cuda", "MI300X", None, False, None, None, None)
    version = int(column.removeprefix("SM"))
    capability = (version // 10, version % 10)
    return DeviceCapabilities("cuda", column, capability, capability >= (8, 9), None, None, None, cuda)


def table() -> list[tuple[str, str, str]]:
    """(recipe, device, cell) of the matrix."""
    lines = DOC.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| recipe | CPU"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return [(row[0], device, cell) for row in rows[2:] for device, cell in zip(rows[0][1:], row[1:], strict=True)]


def test_every_recipe_has_a_row_and_every_device_a_column() -> None:
    assert {recipe for recipe, _, _ in table()} == set(RECIPES)
    assert {device for _, device, _ in table()} == {"CPU", "SM80", "SM89", "SM90", "SM100", "SM120", "ROCm"}


@pytest.mark.parametrize(("recipe", "device", "cell"), table())
def test_the_table_says_what_the_code_does(recipe: str, device: str, cell: str) -> None:
    chosen = get_recipe(recipe)
    ((emulated, mode),) = resolve_emulation("auto", [chosen], capabilities(device), setting="emulate").values()
    assert cell.split(" ")[0] == mode.split(":")[0] == ("emulated" if emulated else "native")
    if emulated:
        with pytest.raises(UserError, match=f"emulate = false, but .*recipe {recipe}"):
            resolve_emulation(False, [chosen], capabilities(device), setting="emulate")
    needed = re.fullmatch(r"native \(CUDA (\d+)\.(\d+)\)", cell)
    if needed:
        major, minor = int(needed[1]), int(needed[2])
        assert why_not_native(chosen, capabilities(device, (major, minor))) is None
        assert why_not_native(chosen, capabilities(device, (major, minor - 1))) is not None
    elif not emulated:
        assert why_not_native(chosen, capabilities(device, (12, 6))) is None


def test_rounded_scales_change_nothing_about_where_a_recipe_runs() -> None:
    rounded = get_recipe("blockwise", power_of_two_scales=True)
    assert why_not_native(rounded, capabilities("SM90")) is None
    assert "Hopper" in str(why_not_native(rounded, capabilities("SM100")))


def test_automatic_emulation_emulates_exactly_the_recipes_that_are_missing() -> None:
    recipes = [get_recipe("rowwise"), get_recipe("blockwise")]
    modes = resolve_emulation("auto", recipes, capabilities("SM100"), setting="emulate")
    assert [emulated for emulated, _ in modes.values()] == [False, True]
    assert modes[recipes[1]][1].startswith("emulated: SM100 has no blockwise product")


def test_without_emulation_each_missing_thing_is_named_once_with_its_recipes() -> None:
    recipes = [get_recipe(name) for name in ("rowwise", "tensorwise", "blockwise")]
    with pytest.raises(UserError) as error:
        resolve_emulation(False, recipes, CPU, setting="emulate")
    (line,) = str(error.value).split("\n")
    assert "(recipe rowwise, tensorwise, blockwise)" in line
    with pytest.raises(UserError, match=r"built for CUDA 12\.8 \(recipe blockwise\)"):
        resolve_emulation(False, recipes, capabilities("SM90", (12, 8)), setting="emulate")
    assert set(resolve_emulation(False, recipes, capabilities("SM90"), setting="emulate").values()) == {
        (False, "native")
    }


@pytest.mark.parametrize("emulate", ["yes", 1, None])
def test_emulation_is_a_bool_or_auto(emulate: object) -> None:
    with pytest.raises(UserError, match='expected true, false or "auto"'):
        resolve_emulation(emulate, [get_recipe(None)], CPU, setting="emulate")


@pytest.mark.parametrize("emulate", ["yes", 1, None])
def test_emulation_of_experts_is_a_bool_or_auto(emulate: object) -> None:
    with pytest.raises(UserError, match='expected true, false or "auto"'):
        resolve_grouped_emulation(emulate, CPU, setting="emulate")


@pytest.mark.parametrize(
    ("device", "lacks"),
    [
        ("CPU", "CPU has no FP8 tensor cores"),
        ("SM80", "SM80 has no FP8 tensor cores"),
        ("SM89", "SM89 has no grouped product with scales by rows"),
        ("SM90", None),
        ("SM100", "SM100 has no grouped product with scales by rows"),
        ("SM120", "SM120 has no grouped product with scales by rows"),
        ("ROCm", "MI300X has no FP8 tensor cores"),
    ],
)
def test_experts_multiply_natively_on_hopper_and_are_emulated_or_refused_elsewhere(
    device: str, lacks: str | None
) -> None:
    assert resolve_grouped_emulation(True, capabilities(device), setting="emulate") == (True, "emulated")
    if lacks is None:
        for emulate in (False, "auto"):
            assert resolve_grouped_emulation(emulate, capabilities(device), setting="emulate") == (False, "native")
        return
    emulated, mode = resolve_grouped_emulation("auto", capabilities(device), setting="emulate")
    assert emulated
    assert mode.startswith(f"emulated: {lacks}")
    with pytest.raises(UserError, match=f'^emulate = false, but {lacks}.*set emulate to true .* or "auto"'):
        resolve_grouped_emulation(False, capabilities(device), setting="emulate")


@pytest.mark.parametrize(
    ("device", "installed", "kernels", "outcome"),
    [
        ("CPU", True, "auto", "torch"),
        ("CPU", True, "torch", "torch"),
        ("CPU", True, "triton", 'CPU is no CUDA device; set kernels = "auto"'),
        ("SM90", True, "auto", "triton"),
        ("SM90", True, "triton", "triton"),
        ("SM90", True, "torch", "run the Triton kernels, which give the same bits"),
        ("SM90", False, "auto", "torch"),
        ("SM90", False, "torch", "torch"),
        ("SM90", False, "triton", "Triton is not installed"),
        ("CPU", True, "cuda", 'expected "auto", "triton" or "torch"'),
    ],
)
def test_kernels_are_what_was_asked_for_or_an_error(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, kernels: str, outcome: str
) -> None:
    monkeypatch.setattr(support, "has_triton", lambda: installed)
    if outcome in ("triton", "torch"):
        assert resolve_kernels(kernels, capabilities(device), setting="kernels") == outcome
    else:
        with pytest.raises(UserError, match=outcome):
            resolve_kernels(kernels, capabilities(device), setting="kernels")


def test_the_device_knows_what_cuda_pytorch_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_fp8.runtime import device

    properties = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 2**30})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for version, expected in (("12.8", (12, 8)), ("13.0", (13, 0)), (None, None)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert device.detect_device().cuda_version == expected
    assert replace(CPU).cuda_version is None
