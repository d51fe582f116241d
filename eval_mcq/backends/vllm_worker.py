"""The part of ``engine=vllm`` that runs in vLLM's environment. It imports nothing of this project.

Reads requests from stdin and writes replies to stdout: eight bytes with the length of a JSON text, the text, and as
many bytes as its field ``bytes`` says. Started by `eval_mcq.backends.vllm_process`.
"""

import json
import os
import struct
import sys
from typing import IO, Any

Message = dict[str, Any]


def read(stream: IO[bytes]) -> tuple[Message, bytes] | None:
    """Return the next message and its bytes, None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    message: Message = json.loads(stream.read(struct.unpack(">Q", head)[0]))
    return message, stream.read(message.get("bytes", 0))


def write(stream: IO[bytes], message: Message) -> None:
    """Write a message without bytes."""
    text = json.dumps(message).encode()
    stream.write(struct.pack(">Q", len(text)) + text)
    stream.flush()


def split(sizes: list[tuple[int, int]], data: bytes) -> tuple[list[Any], bytes]:
    """Return the RGB images at the beginning of some bytes, and the rest."""
    from PIL import Image

    images = []
    for width, height in sizes:
        end = 3 * width * height
        images.append(Image.frombytes("RGB", (width, height), data[:end]))
        data = data[end:]
    return images, data


class Worker:
    """A model in vLLM."""

    def answer(self, message: Message, data: bytes) -> Message:
        """Do what a message asks for."""
        match message["task"]:
            case "versions":
                return self.versions()
            case "load":
                return self.load(message["model"], message["options"])
            case "score":
                return self.score(message["rows"], split(message["images"], data)[0])
            case _:
                images, pixels = split(message["images"], data)
                return self.pixels(message["text"], images, message["shape"], pixels)

    def versions(self) -> Message:
        """Import vLLM; return versions and the kind of device."""
        import vllm  # isort: skip - first, so that its absence shows at once
        import torch
        import transformers
        from vllm.platforms import current_platform

        found = {one.__name__: str(one.__version__) for one in (vllm, torch, transformers)}
        return {**found, "device": current_platform.device_type}

    def load(self, model: str, options: Message) -> Message:
        """Load a model with options of ``vllm.LLM``."""
        from vllm import LLM

        self.folder = model
        self.llm = LLM(model, **options)
        return {}

    def score(self, rows: list[Message], images: list[Any]) -> Message:
        """Return what was read, and log-probabilities of the wanted tokens after it, for each row."""
        from vllm import SamplingParams

        prompts = [
            {
                "prompt_token_ids": row["tokens"],
                "multi_modal_data": {"image": [images[i] for i in row["images"]]},
            }
            for row in rows
        ]
        parameters = [
            SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=row["wanted"], detokenize=False)
            for row in rows
        ]
        found = []
        for row, made in zip(rows, self.llm.generate(prompts, parameters, use_tqdm=False), strict=True):
            (line,) = made.outputs[0].logprobs
            values = [line[token].logprob for token in row["wanted"]]
            found.append({"tokens": list(made.prompt_token_ids), "log_probabilities": values})
        return {"rows": found}

    def pixels(self, text: str, images: list[Any], shape: list[int], pixels: bytes) -> Message:
        """Return how far the pixels of this environment's processor are from given ones; None for another shape."""
        import numpy as np
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
        made = processor(text=[text], images=images, return_tensors="pt")["pixel_values"].float().numpy()
        given = np.frombuffer(pixels, np.float32).reshape(shape)
        same = made.shape == given.shape
        return {"difference": float(np.abs(made - given).max()) if same else None}


def main() -> None:
    """Answer until stdin ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # vLLM and its processes write to stdout, too
    worker = Worker()
    while (given := read(requests)) is not None:
        try:
            reply = worker.answer(*given)
        except Exception as error:  # the other side says what it means
            reply = {"error": str(error) or repr(error), "kind": type(error).__name__}
        write(replies, reply)


if __name__ == "__main__":
    main()
