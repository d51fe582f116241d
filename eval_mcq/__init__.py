"""Multiple-choice disease benchmark: questions, scoring, statistics, tables. Names are imported on first use."""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    from eval_mcq.api.benchmarks import (
        build_benchmark,
        export_benchmark,
        import_benchmark,
        list_presets,
        load_benchmark,
    )
    from eval_mcq.api.results import audit_table, compare, report
    from eval_mcq.api.runs import run
    from eval_mcq.backends.server import Endpoint
    from eval_mcq.runs.model_check import check_model

    __version__: str

__all__ = [
    "Endpoint",
    "audit_table",
    "build_benchmark",
    "check_model",
    "compare",
    "export_benchmark",
    "import_benchmark",
    "list_presets",
    "load_benchmark",
    "report",
    "run",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Endpoint": "backends.server",
        "audit_table": "api.results",
        "build_benchmark": "api.benchmarks",
        "check_model": "runs.model_check",
        "compare": "api.results",
        "export_benchmark": "api.benchmarks",
        "import_benchmark": "api.benchmarks",
        "list_presets": "api.benchmarks",
        "load_benchmark": "api.benchmarks",
        "report": "api.results",
        "run": "api.runs",
    },
)
