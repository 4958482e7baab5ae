"""A job as TOML that starts the same job again."""

from typing import Any

import tomli_w

from titan_fp8.config.section import Section


def to_toml(job: Section) -> str:
    """All keys of `job` with their values, read back by the loader into an equal job.

    Unset keys are left out, as TOML has no word for them (their default is to be unset). `job.config_file` is left out
    too: it says where this text is, not what is in it.
    """
    data = _without_unset(job.model_dump())
    data.get("job", {}).pop("config_file", None)
    return tomli_w.dumps(data)


def _without_unset(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_unset(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }
