"""Makes the tiny teacher: a Llama with seeded random weights and the quickstart's tokenizer.

Tests and benchmarks that need a teacher, but no sensible answers, load its folder in a fraction of
a second. It has the quickstart teacher's vocabulary, chat template and stop ids, so that each of
them can teach the other.

Run: python -m examples.make_models.tiny [--teacher models/SmolLM2-135M-Instruct]
     [--output models/tiny-teacher]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.make_models.quickstart import DEFAULT_OUTPUT as DEFAULT_TEACHER
from examples.make_models.quickstart import (
    ORIGIN_FILE,
    is_complete,
    publish_folder,
    refuse_foreign_folder,
    write_json,
    write_weights,
)

if TYPE_CHECKING:
    import torch


DEFAULT_OUTPUT = Path("models/tiny-teacher")
README = """---
license: apache-2.0
---
# Tiny teacher

Seeded random weights, made by `python -m examples.make_models.tiny`; they say nothing sensible. The
tokenizer and its settings are those of SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB),
Apache License 2.0.
"""
COPIED_FILES = (
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Those that vLLM's CPU attention supports; its GPU kernels support more.
SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# The output head is tied to the embedding. Its input has D numbers of unit variance, so that logits
# have the standard deviation sqrt(D) * EMBEDDING_STD: 3.2 for D = 64. The distributions are then
# neither flat (the usual 0.02 gives 0.16, and every KL is near zero) nor one-hot.
EMBEDDING_STD = 0.4
# Large enough that the layers decide the next token, and not the last token's own embedding.
PROJECTION_STD = 0.2


def make_tiny_model(
    teacher: Path,
    output: Path,
    *,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_attention_heads: int = 2,
    num_key_value_heads: int = 1,
    intermediate_size: int = 128,
    seed: int = 0,
) -> Path:
    """Write a small random Llama to `output`, with the tokenizer and stop ids of `teacher`.

    The same arguments give the same weights. A folder that was made with them is kept as it is.
    Raises ValueError for sizes that attention cannot take, an incomplete teacher, or an `output`
    that was not made here.
    """
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": hidden_size // num_attention_heads,
        "intermediate_size": intermediate_size,
    }
    check_sizes(sizes)
    teacher, output = Path(teacher), Path(output)
    origin = {"made_by": "examples.make_models.tiny", "format_version": 2, "seed": seed, **sizes}
    if is_complete(output, origin):
        return output
    for name in ("config.json", *COPIED_FILES):
        if not (teacher / name).is_file():
            raise ValueError(
                f"the teacher folder {teacher} has no {name}; expected a complete Hugging Face "
                "folder: run `python -m examples.make_models.quickstart` first"
            )
    refuse_foreign_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        for name in COPIED_FILES:
            shutil.copyfile(teacher / name, folder / name)
        config = json.loads((teacher / "config.json").read_text(encoding="utf-8")) | sizes
        write_json(folder / "config.json", config)
        write_weights(folder, random_weights(config, seed))
        (folder / "README.md").write_text(README, encoding="utf-8")
        write_json(folder / ORIGIN_FILE, origin)
        publish_folder(folder, output, origin)
    return output


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise ValueError for sizes that attention or the engine cannot take."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head_dim = sizes["head_dim"]
    if heads * head_dim != sizes["hidden_size"] or head_dim not in SUPPORTED_HEAD_DIMS:
        raise ValueError(
            f"hidden_size {sizes['hidden_size']} over {heads} heads gives head_dim {head_dim}; "
            f"expected an even division into one of {SUPPORTED_HEAD_DIMS}: change hidden_size"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads "
            f"({kv_heads}); set num_key_value_heads to a divisor"
        )


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Draw every matrix from a normal distribution, in the model's order; norm weights are 1."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config))
    weights = {}
    for name, parameter in model.named_parameters():  # A tied head is not among them.
        weight = torch.ones(parameter.shape)
        if weight.ndim == 2:
            std = EMBEDDING_STD if name.endswith("embed_tokens.weight") else PROJECTION_STD
            weight.normal_(std=std, generator=generator)
        weights[name] = weight.to(torch.bfloat16)
    return weights


def main() -> None:
    """Make the tiny teacher's folder from the command line."""
    parser = argparse.ArgumentParser(description="Make the tiny random teacher.")
    parser.add_argument("--teacher", type=Path, default=DEFAULT_TEACHER, help="tokenizer from here")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.teacher, arguments.output, seed=arguments.seed))


if __name__ == "__main__":
    main()
