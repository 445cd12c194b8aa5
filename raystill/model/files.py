"""From a model's name to a folder: a local one, or the Hugging Face cache.

``check`` needs only the small files (configuration, tokenizer); weights are fetched by ``run``.
"""

import json
import os
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raystill.base.errors import RunError
from raystill.base.run_folder import resolve_input

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
ALL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py")
HUB_WAIT_S = 20.0
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "model_max_length",
)


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder, and what its configuration says."""

    name: str
    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``; the language model's part of it where there are several."""
        whole = read_object(self.path / "config.json")
        return {**whole, **(whole.get("text_config") or {})}

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``, empty where there is none."""
        return read_object(self.path / "generation_config.json")

    @property
    def num_layers(self) -> int | None:
        """Transformer layers, if the configuration says."""
        return self.config.get("num_hidden_layers", self.config.get("n_layer"))

    @property
    def vocab_size(self) -> int | None:
        """Rows of the output head, padding included."""
        return self.config.get("vocab_size")

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence the model itself was made for, tokens."""
        limits = [self.config[key] for key in CONTEXT_KEYS if self.config.get(key)]
        if not limits:
            return None
        longest = int(min(limits))
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if scaling.get("rope_type", scaling.get("type")) == "yarn":
            original = scaling.get("original_max_position_embeddings", longest)
            longest = max(longest, int(original * scaling.get("factor", 1)))
        return longest

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end the model's answers by its own account."""
        eos = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds safetensors."""
        return any(self.path.glob("*.safetensors"))


@dataclass(frozen=True)
class Found:
    """A model, or why there is none: a problem now, or a notice that it is looked for later."""

    model: ModelFolder | None = None
    problem: str | None = None
    notice: str | None = None


def find_model(name: str, revision: str | None = None) -> Found:
    """Look for the model's small files: a local folder, the cache, then the Hub."""
    folder = Path(resolve_input(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return Found(problem=f"the folder {name!r} has no config.json; name a model's folder")
        return Found(ModelFolder(name, folder))
    if folder.exists():
        return Found(problem=f"{name!r} is a file; name the folder with config.json and weights")
    if not looks_like_hub_id(name):
        return Found(
            problem=f"there is no folder {name!r} in {os.getcwd()}; run `make setup` if it is one "
            "of the shipped ones, else name an existing folder or a Hugging Face id"
        )
    return _find_on_hub(name, revision)


def looks_like_hub_id(name: str) -> bool:
    """``owner/name`` (or a bare name) that does not start in a folder that is here."""
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~", "/")):
        return False
    return len(parts) == 1 or not Path(resolve_input(parts[0])).is_dir()


def fetch_model(name: str, revision: str | None = None) -> Path:
    """The whole model, weights too; downloads what is missing. Raises RunError."""
    found = find_model(name, revision)
    if found.model is not None and Path(resolve_input(name)).is_dir():
        return found.model.path
    from huggingface_hub import snapshot_download

    if found.model is not None and found.model.path.parent.name == "snapshots":
        revision = found.model.path.name  # What was checked, not what the Hub has since.
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(ALL_FILES)))
    except Exception as error:
        raise RunError(f"{name!r} cannot be fetched from the Hugging Face Hub: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it is broken (the tokeniser reports that)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _find_on_hub(name: str, revision: str | None) -> Found:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def download(offline: bool) -> Path:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(SMALL_FILES), local_files_only=offline
        )
        return Path(folder)

    try:
        cached = download(offline=True)
        if (cached / "config.json").is_file():
            return Found(ModelFolder(name, cached))
    except HFValidationError:
        return Found(problem=f"{name!r} is neither a folder here nor a Hugging Face id")
    except Exception:  # not in the cache: huggingface_hub has several ways to say so
        pass
    if HF_HUB_OFFLINE:
        return Found(
            problem=f"{name!r} is neither a folder here nor in the Hugging Face cache, and "
            "HF_HUB_OFFLINE is set; unset it, or name a local folder"
        )
    outcome: list[Path | BaseException] = []

    def try_download() -> None:
        try:
            outcome.append(download(offline=False))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=try_download, name="hub", daemon=True)
    thread.start()
    thread.join(HUB_WAIT_S)
    result = outcome[0] if outcome else TimeoutError(f"no answer in {HUB_WAIT_S:.0f} s")
    if isinstance(result, Path):
        return Found(ModelFolder(name, result))
    if isinstance(result, RepositoryNotFoundError):
        return Found(
            problem=f"{name!r} is neither a folder here nor on the Hugging Face Hub (or it is "
            "private: log in with `hf auth login`)"
        )
    reason = str(result).splitlines()[0] if str(result) else type(result).__name__
    return Found(notice=f"{name!r} was not checked, the Hub does not answer now ({reason})")
