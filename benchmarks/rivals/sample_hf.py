"""The teacher's answers by Hugging Face's ``generate``, into a file.

python -m benchmarks.rivals.sample_hf WORK        (in .venv-rivals)
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rivals.settings import TEACHER, Folder, Settings, read_lines, write_lines

BATCH = 32
"""Prompts answered at a time; of 8, 16, 32 and 64 the fastest on two cores."""


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one prompt in the teacher's chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def answer(prompts: list[str], settings: Settings, seed: int) -> list[dict[str, Any]]:
    """Prompt and answer of each, as token ids; an answer ends with its stop token, if it ended."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TEACHER, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    ids = [chat_ids(tokenizer, prompt) for prompt in prompts]
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(seed)
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), BATCH):
        mine = order[at : at + BATCH]
        padded = tokenizer.pad({"input_ids": [ids[i] for i in mine]}, return_tensors="pt")
        written = model.generate(
            **padded,
            do_sample=True,
            temperature=settings.temperature,
            min_p=settings.min_p,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings.max_tokens,
            eos_token_id=stop,
            pad_token_id=pad,
        )
        for i, row in zip(mine, written[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = row[: row.index(stop) + 1] if stop in row else row
    return [
        {"prompt": prompt, "prompt_ids": ids[i], "answer_ids": answers[i]}
        for i, prompt in enumerate(prompts)
    ]


def main() -> None:
    """Answer the training prompts."""
    work = Path(sys.argv[1])
    settings, folder = Settings.load(work), Folder(work)
    torch.set_num_threads(settings.cores)
    prompts = [row["prompt"] for row in read_lines(folder.train)]
    write_lines(folder.answers("hf"), answer(prompts, settings, settings.seed))


if __name__ == "__main__":
    main()
