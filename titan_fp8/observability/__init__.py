"""Seeing a run: its folder, metrics, TensorBoard, profiler traces, memory snapshots and the closing summary."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.observability.metrics import MetricsLogger
    from titan_fp8.observability.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
    from titan_fp8.observability.run_folder import create_run_folder, write_run_record
    from titan_fp8.observability.summary import RunSummary, format_summary
    from titan_fp8.observability.versions import collect_versions

__all__ = [
    "MetricsLogger",
    "RunSummary",
    "collect_versions",
    "create_run_folder",
    "format_summary",
    "maybe_enable_memory_snapshot",
    "maybe_enable_profiling",
    "write_run_record",
]

_HOMES = {
    "MetricsLogger": "metrics",
    "RunSummary": "summary",
    "collect_versions": "versions",
    "create_run_folder": "run_folder",
    "format_summary": "summary",
    "maybe_enable_memory_snapshot": "profiling",
    "maybe_enable_profiling": "profiling",
    "write_run_record": "run_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
