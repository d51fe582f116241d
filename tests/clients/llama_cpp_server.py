"""llama.cpp's own server for an exported folder. Runs in the client's Python: imports nothing of ours.

Usage: SERVER_KEY=... python llama_cpp_server.py FOLDER NAME; prints its base URL, and serves until its input ends.
"""

import os
import sys
from pathlib import Path

import xllamacpp

folder = Path(sys.argv[1])
settings = xllamacpp.CommonParams()
settings.model.path = str(folder / "model.gguf")
settings.mmproj.path = str(folder / "mmproj.gguf")
settings.model_alias = {sys.argv[2]}
settings.hostnames = ["127.0.0.1"]
settings.port = 0
settings.api_keys = [os.environ["SERVER_KEY"]]
settings.n_ctx = 4096
settings.n_parallel = 2
settings.use_jinja = True
settings.warmup = False
settings.fit_params = False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(settings)
sys.stdout.write(f"URL {server.listening_address}/v1\n")
sys.stdout.flush()
sys.stdin.read()
