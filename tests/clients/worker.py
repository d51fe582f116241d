"""What another release of transformers makes of a model folder. Runs in that release's Python: imports nothing of ours.

Usage: python worker.py FOLDER REQUEST.npz REQUEST.json; prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

folder, arrays, texts = sys.argv[1:]
given = np.load(arrays)
request = json.loads(Path(texts).read_text())

tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
prompt = processor.apply_chat_template(request["messages"], add_generation_prompt=True)
inputs = processor(images=[Image.fromarray(given["image"])], text=[prompt], return_tensors="pt")
model, info = AutoModelForImageTextToText.from_pretrained(
    folder, output_loading_info=True, torch_dtype=torch.float32
)
model.eval()
batch = {**inputs, "pixel_values": torch.from_numpy(given["pixels"])}
with torch.no_grad():
    logits = model(**batch).logits[0, -1]
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:]
sys.stdout.write(
    "RESULT "
    + json.dumps(
        {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "text_ids": tokenizer(request["text"]).input_ids,
            "prompt": prompt,
            "prompt_ids": inputs["input_ids"][0].tolist(),
            "pixel_difference": float(
                (inputs["pixel_values"].double() - batch["pixel_values"].double()).abs().max()
            ),
            "logits": logits.tolist(),
            "generated": generated.tolist(),
        }
    )
    + "\n"
)
