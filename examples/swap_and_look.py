# %% [markdown]
# # Swap and look
#
# Put a tower into a LLaVA, look at what changes before anything is written, and look through both towers at
# the same picture. Toy models with random weights stand for real ones; replace `example/llava` and
# `example/tower` by your own paths. It takes half a minute on a CPU and writes to a temporary folder.

# %%
import tempfile
from pathlib import Path

import torch
from PIL import Image

from mllm_adapters import align, load_mllm, plan_swap, verify
from mllm_adapters.examples.untrained import write_example

place = Path(tempfile.mkdtemp(prefix="swap_and_look_"))
example = write_example(place / "example")
mllm, encoder = example / "llava", example / "tower"

# %% [markdown]
# ## Look before
#
# The plan is made from headers. It knows every tensor of the result, and the vision contract before and
# after.

# %%
plan = plan_swap(mllm, encoder)
print(plan.report())
print("tokens per image:", plan.plan.before.tokens, "->", plan.plan.after.tokens)

# %% [markdown]
# ## Swap, with the projector fitted on unlabeled images
#
# `align` runs both towers on the pictures and solves for the connector. R² near 1: the new features explain
# what the old layer computed. (Random towers on colored noise explain each other only in part.)

# %%
aligned = align(plan, example / "photographs", device="cpu")
for fit in aligned.alignment.fits:
    print(fit.connector, f"R² held out {fit.r2:.2f}")
swapped = place / "swapped"
aligned.write(swapped)

# %% [markdown]
# ## Look after
#
# `verify` compares the folder with its record, loads it, and blanks an image.

# %%
checks = verify(swapped, encoder=encoder)
for check in checks:
    print({True: "✓", False: "✗", None: "–"}[check.passed], check.name)
assert all(check.passed is not False for check in checks)

# %% [markdown]
# The same picture through the visual tokens of both models: as many, of the language model's width, and
# close to each other, because the projector was fitted.

# %%
picture = Image.open(sorted((example / "photographs").iterdir())[0]).convert("RGB")


def visual_tokens(folder: Path) -> torch.Tensor:
    """Return what the language model receives for the picture, [tokens, width]."""
    model, processor = load_mllm(folder)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels)
    found = getattr(features, "pooler_output", features)
    return torch.cat(list(found)) if isinstance(found, (list, tuple)) else found.flatten(0, -2)


before, after = visual_tokens(mllm), visual_tokens(swapped)
print("visual tokens:", tuple(before.shape), "->", tuple(after.shape))
distance = float((after - before).norm() / (before - before.mean(0)).norm())
print(f"distance over spread: {distance:.2f} (1: no better than a constant)")
assert before.shape == after.shape

# %% [markdown]
# ## Undo
#
# `restore(swapped, out, mllm=mllm)` gives the original back, bit by bit; with `to_encoder=True` the tower
# alone. From a terminal, all of this is `swap-encoder`: see [Swap a tower](../docs/howto/swap.md).
