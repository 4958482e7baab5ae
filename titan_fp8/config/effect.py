"""A key that would do nothing is not accepted.

Some keys have an effect only beside another: `checkpoint.interval` with `checkpoint.enable`,
`activation_checkpoint.memory_budget` with `mode = "memory_budget"` (`only_with` and `switch` in
`titan_fp8.config.section`). Whoever sets such a key alone believes in something that does not happen.

Three cases are no mistake:

- the value is the default;
- a TOML file keeps the key for later beside a switch that it turns off itself (`enable = false`), as recipes do;
- the command line changes the switch. Then the TOML file's key is dropped, and a line says so.
"""

from collections.abc import Mapping
from typing import Any

from titan_fp8.config.given import Sources
from titan_fp8.config.keys import Key
from titan_fp8.config.text import show


def refuse_keys_without_effect(keys: Mapping[str, Key], sources: Sources) -> None:
    """Note a violation for each given key whose condition is not met, or drop it."""
    dropped: dict[str, list[str]] = {}
    for path, key in keys.items():
        given = sources.winner(path)
        if given is None or not key.is_supported or given.value == key.default:
            continue
        for wanted, parked_by in key.conditions:
            if _is_met(wanted, keys, sources):
                continue
            reason = _state(wanted, keys, sources)
            if given.source == "cli":
                sources.violations.append(given.violation(f"has no effect while {reason}; add {_options(wanted)}"))
            elif _is_parked(wanted, parked_by, sources):
                pass
            elif any(switch in sources.cli for switch in wanted):
                dropped.setdefault(reason, []).append(path)
            else:
                sources.violations.append(given.violation(_advice(wanted, parked_by, reason)))
            break
    for reason, paths in dropped.items():
        sources.drop(paths, reason)


def _is_met(wanted: Mapping[str, list[Any]], keys: Mapping[str, Key], sources: Sources) -> bool:
    """Whether one of the switches has one of its values. A switch that could not be read counts as met."""
    return any(
        switch in sources.rejected or sources.effective(keys, switch) in values for switch, values in wanted.items()
    )


def _is_parked(wanted: Mapping[str, list[Any]], parked_by: list[Any], sources: Sources) -> bool:
    written = [sources.winner(switch) for switch in wanted]
    return any(given is not None and given.value in parked_by for given in written)


def _state(wanted: Mapping[str, list[Any]], keys: Mapping[str, Key], sources: Sources) -> str:
    return " and ".join(f"{switch} = {show(sources.effective(keys, switch))}" for switch in wanted)


def _options(wanted: Mapping[str, list[Any]]) -> str:
    """What to add to the command line."""
    ways = [f"--{switch}" if values[0] is True else f"--{switch}={values[0]}" for switch, values in wanted.items()]
    return " or ".join(ways)


def _advice(wanted: Mapping[str, list[Any]], parked_by: list[Any], reason: str) -> str:
    """What to change in the TOML file."""
    ways = " or ".join(f"{switch} = {show(values[0])}" for switch, values in wanted.items())
    message = f"has no effect while {reason}; set {ways} or remove the key"
    if len(wanted) == 1 and False in parked_by:
        return f"{message} (to keep it for later, write {next(iter(wanted))} = false)"
    return message
