"""``make fuzz``: damaged inputs for every reader, and a summary.

python -m tests.fuzz 10000                        all readers
python -m tests.fuzz 500 --readers runs,recipes   some
python -m tests.fuzz --replay fuzz-findings/runs_0 tests/fuzz/corpus/*
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.fuzz.readers import READERS

FINDINGS = Path("fuzz-findings")


def main() -> int:
    """Run what was asked for; 1 where there are findings."""
    options = _options()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "200",
    }
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        return _replay(options.replay, scratch) if options.replay else _search(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "number", type=int, nargs="?", default=1000, help="inputs, shared out among the readers"
    )
    parser.add_argument("--readers", default="", help="names separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=FINDINGS, help="folder for what is found")
    parser.add_argument("--replay", type=Path, nargs="+", help="folders of saved inputs to run again")
    return parser.parse_args()


def _search(options: argparse.Namespace, scratch: Path) -> int:
    from tests.fuzz.harness import warm, worker_of
    from tests.fuzz.search import check_valid, search

    names = [name for name in options.readers.split(",") if name]
    if unknown := set(names) - {reader.name for reader in READERS}:
        sys.exit(f"no reader is called {', '.join(unknown)}: known are {', '.join(r.name for r in READERS)}")
    readers = [reader for reader in READERS if not names or reader.name in names]
    console = Console(stderr=True)
    warm()
    table = Table("reader", title=f"{options.number} inputs, seed {options.seed}", title_justify="left")
    for heading in ("inputs", "ok", "refused", "findings", "kinds", "slowest", "inputs/s"):
        table.add_column(heading, justify="right")
    kinds = 0
    for place, reader in enumerate(readers):
        share = options.number * (place + 1) // len(readers) - options.number * place // len(readers)
        worker = worker_of(reader, scratch / reader.name)
        try:
            check_valid(worker)
        except RuntimeError as error:
            console.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
            kinds += 1
            continue
        options.save.mkdir(parents=True, exist_ok=True)
        found = search(
            worker,
            share,
            options.seed,
            options.save,
            lambda line: console.print(line, markup=False, soft_wrap=True),
        )
        worker.close()
        shutil.rmtree(scratch / reader.name)
        kinds += len(found.findings)
        counts = (found.verdicts[kind] for kind in ("ok", "refused", "finding"))
        rate = found.inputs / max(found.seconds, 1e-9)
        table.add_row(
            reader.name,
            *map(str, (found.inputs, *counts, len(found.findings))),
            f"{found.slowest:.1f} s",
            f"{rate:.0f}",
        )
        console.print(f"{reader.name}: {found.inputs} inputs in {found.seconds:.0f} s", highlight=False)
    Console(width=120).print(table)
    return 1 if kinds else 0


def _replay(folders: list[Path], scratch: Path) -> int:
    from tests.fuzz.harness import warm, worker_of
    from tests.fuzz.search import reader_of, replay

    warm()
    findings = 0
    for reader in READERS:
        mine = [folder for folder in folders if reader_of(folder) == reader]
        if not mine:
            continue
        worker = worker_of(reader, scratch / reader.name)
        for folder in mine:
            for command, _, verdict in replay(worker, folder.absolute()):
                findings += verdict.kind == "finding"
                print(f"{verdict.kind:8}{folder.name}: {command}\n        {verdict.what}")  # noqa: T201
        worker.close()
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
