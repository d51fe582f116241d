"""What another release of transformers makes of a tower's folders. Runs in its Python: imports nothing of ours.

Usage: python tower_worker.py PLACE; PLACE holds vision/, clip/, open-clip/, image.png, pixels.npy and labels.json.
Prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, CLIPVisionModel, pipeline

place = Path(sys.argv[1])
labels = json.loads((place / "labels.json").read_text())
image = Image.open(place / "image.png")
pixels = torch.from_numpy(np.load(place / "pixels.npy"))

vision, told = CLIPVisionModel.from_pretrained(place / "vision", output_loading_info=True)
whole, told_too = CLIPModel.from_pretrained(place / "clip", output_loading_info=True)
classify = pipeline("zero-shot-image-classification", model=str(place / "clip"), device="cpu")
tokens = classify.tokenizer(labels, padding=True, return_tensors="pt")
theirs = open_clip.create_model_and_transforms(f"local-dir:{place / 'open-clip'}")[0].eval()
their_tokens = open_clip.get_tokenizer(f"local-dir:{place / 'open-clip'}")(labels)
processor = AutoImageProcessor.from_pretrained(place / "vision")
with torch.no_grad():
    both = whole.eval()(pixel_values=pixels, **tokens)
    found = {
        "missing": [
            name
            for info in (told, told_too)
            for kind in ("missing_keys", "unexpected_keys")
            for name in info[kind]
        ],
        "vision": vision.eval()(pixel_values=pixels).last_hidden_state.tolist(),
        "pixels": processor(image, return_tensors="pt")["pixel_values"].tolist(),
        "images": {
            "clip": both.image_embeds.tolist(),
            "open-clip": theirs.encode_image(pixels, normalize=True).tolist(),
        },
        "texts": {
            "clip": both.text_embeds.tolist(),
            "open-clip": theirs.encode_text(their_tokens, normalize=True).tolist(),
        },
        "scores": {
            row["label"]: row["score"]
            for row in classify(image, candidate_labels=labels, hypothesis_template="{}")
        },
    }
sys.stdout.write("RESULT " + json.dumps(found) + "\n")
