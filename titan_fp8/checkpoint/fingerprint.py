"""Is this checkpoint one of this run? The fingerprint is what a run says of itself, written beside its tensors.

It is a nested dict of plain values: `{"model": {"dim": 4096, ...}, "recipe": {...}}`. Most mistakes would be found by
tensor shapes too, but later and less clearly, and some not at all: another RoPE base or number of heads changes no
shape. So the fingerprints are compared field by field before any tensor is read.

`recipe` describes how numbers are quantized. The tensors of a checkpoint are in high precision under unchanged names,
so a run may change it on purpose; the default is that it does not do so by accident.
"""

from __future__ import annotations

import json
from typing import Any

from titan_fp8.checkpoint.folder import CheckpointError

RECIPE = "recipe"
_ABSENT = "(not there)"


def normalized(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint as it comes back from a file: tuples are lists, keys are strings.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.loads(json.dumps(fingerprint, sort_keys=True))


def differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The fields that differ: (dotted name, value in the checkpoint, value here)."""
    left, right = _flatten(saved), _flatten(normalized(ours))
    names = sorted(left.keys() | right.keys())
    rows = [(name, left.get(name, _ABSENT), right.get(name, _ABSENT)) for name in names]
    return [row for row in rows if row[1] != row[2]]


def check(
    where: str,
    saved: dict[str, Any],
    ours: dict[str, Any],
    *,
    allow_model_change: bool,
    allow_recipe_change: bool,
) -> None:
    """Raise if a checkpoint belongs to another model, or to another recipe.

    Args:
        where: name of the checkpoint, for the message.
        allow_model_change: `checkpoint.allow_model_change`.
        allow_recipe_change: `checkpoint.allow_recipe_change`.

    Raises:
        CheckpointError: with every differing field that is not allowed to differ.
    """
    complaints = []
    rows = differences(saved, ours)
    recipe = [row for row in rows if row[0].split(".")[0] == RECIPE]
    model = [row for row in rows if row not in recipe]
    if model and not allow_model_change:
        complaints.append(
            _table(f"{where} holds another model than this run's", model)
            + "\nuse the settings it was written with, or set checkpoint.allow_model_change = true if every tensor "
            "that is loaded still means the same (other RoPE settings; parts that are new or gone, which "
            "checkpoint.exclude_from_loading names)"
        )
    if recipe and not allow_recipe_change:
        complaints.append(
            _table(f"{where} was written with another quantization recipe than this run's", recipe)
            + "\nuse that recipe, or set checkpoint.allow_recipe_change = true to go on with this run's"
        )
    if complaints:
        raise CheckpointError("\n".join(complaints))


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= _flatten(entry, f"{name}.") if isinstance(entry, dict) else {name: entry}
    return flat


def _table(title: str, rows: list[tuple[str, Any, Any]]) -> str:
    lines = [f"  {name}: {_show(a)} in the checkpoint, {_show(b)} here" for name, a, b in rows]
    return "\n".join([f"{title}:", *lines])


def _show(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)
