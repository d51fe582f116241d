"""Multiple-choice disease benchmark: questions, scoring, statistics, tables. Names are imported on first use."""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    from eval_mcq.api import (
        build_benchmark,
        compare,
        export_benchmark,
        import_benchmark,
        list_presets,
        load_benchmark,
        report,
        run,
    )
    from eval_mcq.backends.server import Endpoint
    from eval_mcq.runs.model_check import check_model

    __version__: str

__all__ = [
    "Endpoint",
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
    dict.fromkeys(__all__, "api") | {"check_model": "runs.model_check", "Endpoint": "backends.server"},
)
