"""What llama.cpp makes of an exported folder. Runs in the client's Python: imports nothing of ours.

Usage: python llama_cpp_worker.py FOLDER REQUEST.json; prints one line of JSON.
"""

import base64
import json
import sys
from pathlib import Path

import xllamacpp

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
settings = xllamacpp.CommonParams()
settings.model.path = str(folder / "model.gguf")
settings.mmproj.path = str(folder / "mmproj.gguf")
settings.n_ctx = 1024
settings.n_parallel = 1
settings.use_jinja = True
settings.warmup = False
settings.fit_params = False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
# Without flash attention, keys and values are float32 in the tower, and as asked for in the language model.
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(settings)

answers = []
for picture in request["pictures"]:
    url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": request["question"]},
    ]
    reply = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": request["tokens"],
            "logit_bias": [
                [request["letter"], 100]
            ],  # an end token would have no log-probabilities; these are without it
            "cache_prompt": False,
        }
    )
    first = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logprobs = {one["id"]: one["logprob"] for one in first}
    answers.append({"prompt_tokens": reply["usage"]["prompt_tokens"], "logprobs": logprobs})
sys.stdout.write("RESULT " + json.dumps(answers) + "\n")
