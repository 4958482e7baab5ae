"""A family and a flavor of it, resolved to dimensions, without torch: the configuration asks before anything heavy
starts.

A *family* (`llama3`) is an architecture; a *flavor* (`8B`) is one set of dimensions for it. Both are data
(`titan_fp8.models.families`): there is one decoder, and `ModelDims` is all it needs to know.

    resolve_dims("llama3", "8B", {"n_layers": 8})      # the 8B model, cut to 8 of its 32 layers
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from titan_fp8.models.dims import ModelDims
from titan_fp8.models.families import FLAVORS
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean


def resolve_dims(name: str, flavor: str, overrides: Mapping[str, Any] | None = None) -> ModelDims:
    """The dimensions of `name`/`flavor` with `overrides` applied.

    Args:
        name: a family, e.g. `"llama3"` (`model.name`).
        flavor: a flavor of that family, e.g. `"8B"` (`model.flavor`).
        overrides: fields of `ModelDims` to replace; a value of None leaves the flavor's.

    Raises:
        UserError: an unknown family, flavor or field (with the nearest name), or dimensions that do not fit together;
            in the latter case every broken rule is named.
    """
    if name not in FLAVORS:
        raise UserError(f'model.name = "{name}": not one of {", ".join(FLAVORS)}{did_you_mean(name, FLAVORS)}')
    flavors = FLAVORS[name]
    if flavor not in flavors:
        raise UserError(
            f'model.flavor = "{flavor}": not a flavor of {name}, which has {", ".join(flavors)}'
            f"{did_you_mean(flavor, flavors)}"
        )
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    known = [field.name for field in fields(ModelDims)]
    unknown = [f"model.overrides.{key}: no such key{did_you_mean(key, known)}" for key in given if key not in known]
    if unknown:
        raise UserError("\n".join(unknown))
    return replace(flavors[flavor], **given)
