"""A model of ours, a stock model and a model behind a server stand in one table, paired question by question."""

import pytest

from eval_mcq import Endpoint, compare, report, run
from eval_mcq.items.schema import load_bench
from tests.eval_mcq.chat_server import NAME, serving
from tests.eval_mcq.helpers import small_bench
from tests.eval_mcq.stock_models import STOCK


@pytest.fixture
def rows(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    bench = small_bench(tmp_path)
    with serving() as server:
        served = run(NAME, bench, tmp_path / "served", endpoint=Endpoint(server.url), rotations=2)
    return {
        "ours": run(tiny_llava, bench, tmp_path / "ours", rotations=2),
        "idefics3": run(STOCK["idefics3"](tmp_path / "idefics3"), bench, tmp_path / "stock", rotations=2),
        "served": served,
    }


def test_reference_rows_stand_in_table_and_report_as_arms(rows, tmp_path):
    found = compare(rows, table_layout="long").to_csv()
    base, stock, served = (rows[name].answers for name in rows)
    assert [a.id for a in base] == [a.id for a in stock] == [a.id for a in served]
    assert all(name in found for name in rows)
    table = compare(rows).to_markdown()
    assert "Gains: idefics3, served against ours, on the same questions" in table
    assert "Not answered by this project's engine: idefics3 by transformers" in table
    assert "served by endpoint chat-completions-1" in table
    page = tmp_path / "report.html"
    report(rows, page, thumbnails=False)
    text = page.read_text()
    assert all(name in text for name in rows)
    assert len(load_bench(tmp_path / "bench.jsonl").items) == len(base)
