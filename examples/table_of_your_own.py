# %% [markdown]
# # A table of your own
#
# From a label table to a per-disease table of two models. The pictures are drawn, the models have random
# weights, so the figures are those of guessing: the point is the way. It takes about two minutes on a CPU
# and writes to a temporary folder.

# %%
import tempfile
from pathlib import Path

from eval_mcq import build_benchmark, compare, load_benchmark, report, run
from mgll_encoder.data.phantom.dataset import write_phantom
from mllm_adapters import plan_swap
from mllm_adapters.examples.untrained import write_example

place = Path(tempfile.mkdtemp(prefix="table_of_your_own_"))
write_phantom(place / "phantom", 6)
labels = place / "phantom" / "labels.csv"
print(labels.read_text().splitlines()[:3])

# %% [markdown]
# ## Questions
#
# One question for each disease of an image; none of its diseases is ever a wrong option.
# `preset="mine.json"` asks about your own diseases, `split="test"` about the patients of one part only.

# %%
bench = place / "bench.jsonl"
build_benchmark(labels, place / "phantom", bench, min_negatives=1)
questions = load_benchmark(bench)
first = questions.items[0]
print(len(questions.items), "questions")
print(first.question, first.options, "->", first.letter)

# %% [markdown]
# ## Answers
#
# Two models answer the same questions. A run is a folder; the same call continues an interrupted one.

# %%
example = write_example(place / "example")
plan_swap(example / "llava", example / "tower").write(place / "swapped")
base = run(example / "llava", bench, place / "runs" / "base")
swapped = run(place / "swapped", bench, place / "runs" / "swapped")

# %% [markdown]
# ## The table
#
# Every cell with n and interval, every gain with a paired test. An arm called `control` would be the
# reference of all gains.

# %%
table = compare({"base": base, "swapped": swapped})
print(table.to_markdown())
report({"base": base, "swapped": swapped}, place / "report.html")
assert (place / "report.html").stat().st_size > 10_000

# %% [markdown]
# From a terminal: [A table of your own](../docs/howto/table.md), [Evaluate disease by
# disease](../docs/howto/evaluate.md).
