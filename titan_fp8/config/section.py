"""What every section of the configuration is made of.

A *section* is one `[table]` of the TOML file: a frozen, strict pydantic model that lives beside the component it
configures (`titan_fp8/optim/config.py` holds `[optimizer]`). Each key is an annotated attribute, and the string under
it is its documentation: the same sentence appears in `--help`, in `docs/configuration.md` and in the editor (through
the JSON schema).

    class OptimizerSection(Section):
        lr: float = key(8e-4, ge=0)
        \"\"\"Peak learning rate.\"\"\"

Strict means that a value has the type that is written down: `"2048"` is not an integer, and neither is 10.5. The one
conversion is from an integer to a float (`lr = 1`). Ranges are pydantic constraints (`ge=1`), so they appear in the
schema as well.

What pydantic has no word for is kept beside the field and read by the loader:

- the unit of a number;
- the mark of a key whose feature does not exist yet. It is known and documented, and refused at any value but its
  default: a key that were accepted and ignored would be a lie;
- the condition under which a key has an effect. Setting `checkpoint.interval` with checkpoints off does nothing, so it
  is refused (`titan_fp8.config.effect` says where exactly).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UNIT = "unit"
NOT_SUPPORTED_YET = "not_supported_yet"
UNSUPPORTED_VALUES = "unsupported_values"
ONLY_WITH = "only_with"
PARKED_BY = "parked_by"

OFF = (False, "none")
"""Values that switch something off."""


@dataclass(frozen=True)
class Problem:
    """A broken rule.

    Attributes:
        key: the key it is about, seen from the section that reports it (`keep_latest_k`), or a section, or "" for the
            reporting section itself. From a rule over the whole job: the whole path.
        text: what is wrong and the remedy. For a key, the loader puts `key = value: ` before it.
        is_sentence: `text` is a sentence of its own that names the key itself.
    """

    key: str
    text: str
    is_sentence: bool = False


class Section(BaseModel):
    """Base of all section classes: strict types, no unknown keys, immutable, no NaN or infinity."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    switch: ClassVar[str | None] = None
    """Name of the key that turns this section on: the other keys have an effect only with it."""

    def problems(self) -> Iterator[Problem]:
        """Rules between the keys of this section that are broken. Rules between sections stand in `job_config.py`."""
        yield from ()


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1")
    return value


CountOrAuto = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""A count of at least 1, or -1 for "work it out"."""


def key(
    default: Any,
    *,
    unit: str | None = None,
    unsupported_values: Sequence[Any] = (),
    only_with: Mapping[str, Sequence[Any]] | None = None,
    parked_by: Sequence[Any] = OFF,
    **constraints: Any,
) -> Any:
    """One key of a section.

    Args:
        default: value when neither the TOML file nor the command line names the key.
        unit: unit of the value, shown by `--help` ("steps", "tokens", "s").
        unsupported_values: legal values whose feature does not exist yet; they are refused by name.
        only_with: the key has an effect only when one of these keys of the same section has one of these values.
        parked_by: values of those keys beside which a TOML file may keep the key for later.
        constraints: pydantic's `ge`, `gt`, `le`, `lt`, `min_length`...
    """
    extra: dict[str, Any] = {}
    if unit is not None:
        extra[UNIT] = unit
    if unsupported_values:
        extra[UNSUPPORTED_VALUES] = list(unsupported_values)
    if only_with is not None:
        extra[ONLY_WITH] = {name: list(values) for name, values in only_with.items()}
        extra[PARKED_BY] = list(parked_by)
    return Field(default, json_schema_extra=extra or None, **constraints)


def not_supported_yet(default: Any, *, unit: str | None = None, **constraints: Any) -> Any:
    """A key whose feature does not exist yet: any value other than `default` is refused."""
    extra: dict[str, Any] = {NOT_SUPPORTED_YET: True}
    if unit is not None:
        extra[UNIT] = unit
    return Field(default, json_schema_extra=extra, **constraints)
