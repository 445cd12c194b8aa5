"""The teacher's answers by vLLM's offline ``LLM``, into a file.

    python -m benchmarks.rivals.sample_vllm WORK [--demo LINES]        (in .venv-rivals)

With ``--demo`` those of the prompts that the demo trains on, of so many lines of its file.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from benchmarks.rivals.sample_hf import chat_ids
from benchmarks.rivals.settings import (
    TEACHER,
    Folder,
    Settings,
    read_lines,
    training_prompts,
    write_json,
    write_lines,
)


def main() -> None:
    """Answer the training prompts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--demo", type=int)
    given = parser.parse_args()
    settings, folder = Settings.load(given.work), Folder(given.work)
    tokenizer: Any = AutoTokenizer.from_pretrained(TEACHER)
    side, rows = "vllm", read_lines(folder.train)
    if given.demo:
        side, rows = "own", training_prompts(given.demo)
    prompts = [row["prompt"] for row in rows]
    ids = [chat_ids(tokenizer, prompt) for prompt in prompts]
    began = time.monotonic()
    engine = LLM(
        TEACHER, dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_memory_bytes=2 << 30
    )
    loaded_s, began = time.monotonic() - began, time.monotonic()
    sampling = SamplingParams(
        temperature=settings.temperature, min_p=settings.min_p, max_tokens=settings.max_tokens
    )
    outputs = engine.generate([{"prompt_token_ids": one} for one in ids], sampling)
    rows = [
        {"prompt": prompt, "prompt_ids": one, "answer_ids": list(output.outputs[0].token_ids)}
        for prompt, one, output in zip(prompts, ids, outputs, strict=True)
    ]
    write_lines(folder.answers(side), rows)
    figures = {"load_s": loaded_s, "sampling_s": time.monotonic() - began}
    write_json(folder.work / "figures" / f"{side}-sample.json", figures)


if __name__ == "__main__":
    main()
