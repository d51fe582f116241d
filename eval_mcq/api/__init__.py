"""The public functions, by topic. Paths are checked before anything heavy is imported."""

from eval_mcq.api.benchmarks import (
    build_benchmark,
    export_benchmark,
    import_benchmark,
    list_presets,
    load_benchmark,
)
from eval_mcq.api.results import audit_table, compare, report
from eval_mcq.api.runs import default_run_folder, run, shard_of

__all__ = [
    "audit_table",
    "build_benchmark",
    "compare",
    "default_run_folder",
    "export_benchmark",
    "import_benchmark",
    "list_presets",
    "load_benchmark",
    "report",
    "run",
    "shard_of",
]
