"""Two steps of TRL on a swapped model. Runs in TRL's environment: imports nothing of ours.

Usage: python train_trl.py FOLDER ROWS.json IMAGES OUT; prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

folder, file, images, out = sys.argv[1:]
rows = [
    {"messages": row["messages"], "images": [str(Path(images) / name) for name in row["images"]]}
    for row in json.loads(Path(file).read_text())
]
data = Dataset.from_list(rows).cast_column("images", [Image()])
settings = SFTConfig(
    out, max_steps=2, per_device_train_batch_size=2, assistant_only_loss=True, max_length=None, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
)  # fmt: skip
trainer = SFTTrainer(
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
    args=settings,
    train_dataset=data,
    processing_class=AutoProcessor.from_pretrained(folder),
)
batch = trainer.data_collator([data[i] for i in range(len(data))])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
found = {"ids": batch["input_ids"].tolist(), "labels": batch["labels"].tolist(), "losses": losses}
sys.stdout.write("RESULT " + json.dumps(found) + "\n")
