# %% [markdown]
# # A tower of your own
#
# Train a small tower with the MGLL losses on drawn photographs, measure its features on other patients, and
# put it into a LLaVA. With a table of your own, replace the first cell. It takes about two minutes on a CPU
# and writes to a temporary folder.

# %%
import tempfile
from pathlib import Path

from mgll_encoder import inspect_tower, linear_probe, pretrain, zero_shot
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.phantom.dataset import write_phantom
from mllm_adapters import plan_swap
from mllm_adapters.examples.untrained import write_example

place = Path(tempfile.mkdtemp(prefix="tower_of_your_own_"))
write_phantom(place / "phantom", 12)
labels, images = place / "phantom" / "labels.csv", place / "phantom"
print(labels.read_text().splitlines()[:3])

# %% [markdown]
# ## Labels become texts
#
# Each label becomes texts at several granularities. Patients are split: none is in two parts.

# %%
manifest = place / "manifest.jsonl"
build_fundus(FundusTable(labels), images, manifest)
print(manifest.read_text().splitlines()[1])

# %% [markdown]
# ## Train
#
# Two epochs of the smallest tower, to show the steps. `init="openai"` starts from OpenAI's CLIP,
# `init="facebook/dinov2-small"` from a general DINOv2; `loss="clip"` trains the control on the same words.

# %%
trained = pretrain(manifest, place / "tower", epochs=2, batch_size=16, workers=0)
print("loss per epoch:", [round(loss, 3) for loss in trained.losses])
assert trained.losses[-1] < trained.losses[0]

# %% [markdown]
# ## Measure
#
# A linear probe on frozen features, and zero-shot from the names of the diseases, both on patients that
# were not in the training.

# %%
probe = linear_probe(place / "tower", labels, images, min_positives=2, workers=0)
print("probe AUC:", probe.result.macro["AUC"])
without_training = zero_shot(place / "tower", labels, images, prompts="fundus", min_positives=2, workers=0)
print("zero-shot AUC:", without_training.result.macro["AUC"])

# %% [markdown]
# ## Use
#
# The folder is an ordinary tower: `inspect_tower` describes it, and a swap takes it.

# %%
spec = inspect_tower(place / "tower").spec
print(spec.width, "wide,", spec.image_size, "px,", spec.activation)
example = write_example(place / "example")
plan_swap(example / "llava", place / "tower").write(place / "swapped")
assert (place / "swapped" / "mgll_swap.json").is_file()

# %% [markdown]
# From a terminal: [A tower of your own](../docs/howto/tower.md).
