"""vLLM's own OpenAI-compatible server as a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.end_to_end import TEACHER

UP_WITHIN_S = 300.0
MAX_MODEL_LEN = 256
MAX_LOGPROBS = 64


@contextmanager
def vllm_server(log: Path) -> Iterator[str]:
    """The tiny teacher in float32, as the model ``large``; gives the server's URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # One process less to start.
    words = ["--model", str(TEACHER), "--served-model-name", "large", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"]
    words += ["--max-logprobs", str(MAX_LOGPROBS)]
    words += ["--kv-cache-memory-bytes", str(2**29)]  # A stated size skips the warm-up.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + UP_WITHIN_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
