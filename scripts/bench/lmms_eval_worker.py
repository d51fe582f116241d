"""Part of mcq.py that runs in an environment with lmms-eval: answers one list of questions per line of stdin.

Started by that script. A line is a JSON list of [image file, user's turn]; the reply is a JSON object with the seconds
that the adapter took and the model's replies.
"""

import json
import os
import sys
import time

from PIL import Image


def main() -> None:
    """Load the adapter, then answer until stdin ends."""
    model, template, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the adapter and its libraries write to stdout, too
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf

    # Its default device_map, an empty string, is refused by transformers 5.
    adapter = LlavaHf(
        pretrained=model, device="cpu", device_map="cpu", dtype="float32", chat_template=template
    )
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        adapter.task_dict["bench"] = {"test": [path for path, _ in asked]}
        requests = [
            Instance(
                request_type="generate_until",
                arguments=(
                    f"<image>\n{text}",
                    {"max_new_tokens": new_tokens},
                    lambda path: [Image.open(path).convert("RGB")],
                    number,
                    "bench",
                    "test",
                ),
                idx=0,
                metadata={"task": "bench", "doc_id": number, "repeats": 1},
            )
            for number, (_, text) in enumerate(asked)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        texts = adapter.generate_until(requests)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        replies.write(json.dumps({**spent, "replies": texts}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
