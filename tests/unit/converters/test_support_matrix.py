"""The table of devices in docs/float8.md says what the code does."""

from pathlib import Path

import pytest

from titan_fp8.converters.float8_linear import resolve_emulation
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

DOC = Path(__file__).parents[3] / "docs" / "float8.md"


def capabilities(column: str) -> DeviceCapabilities:
    if column == "CPU":
        return DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
    if column == "ROCm":
        return DeviceCapabilities("cuda", "MI300X", None, False, None, None, None)
    version = int(column.removeprefix("SM"))
    capability = (version // 10, version % 10)
    return DeviceCapabilities("cuda", column, capability, capability >= (8, 9), None, None, None)


def table() -> list[tuple[str, str, str]]:
    """(recipe, device, cell) of the matrix."""
    lines = DOC.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| recipe | CPU"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return [(row[0], device, cell) for row in rows[2:] for device, cell in zip(rows[0][1:], row[1:], strict=True)]


def test_every_recipe_has_a_row() -> None:
    assert {recipe for recipe, _, _ in table()} == set(RECIPES)


@pytest.mark.parametrize(("recipe", "device", "cell"), table())
def test_the_table_says_what_the_code_does(recipe: str, device: str, cell: str) -> None:
    emulated, _ = resolve_emulation("auto", capabilities(device), setting="emulate")
    assert cell == ("emulated" if emulated else "native")
    if emulated:
        with pytest.raises(UserError, match="emulate = false"):
            resolve_emulation(False, capabilities(device), setting="emulate")
