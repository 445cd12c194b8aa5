"""Finds a model by its name: a local folder, the Hugging Face cache, or the Hub.

``check`` needs only the small files (configuration, tokenizer); ``run`` fetches the weights too.
Imports no torch.
"""

import json
import math
import os
import re
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raystill.base.errors import RunError, config_error
from raystill.base.records import LARGEST_INTEGER, number, read_bounded
from raystill.base.redact import shown_value
from raystill.base.run_folder import resolve_input

NO_LIMIT = int(1e30)
"""What transformers writes for a length without a limit; no other integer has more than 64 bits."""
LARGEST_FLOAT = 3.5e38
"""float32 has no larger numbers; the least of all stands in files as a mask."""
LIMITS = ("time_step_limit", "dt_limit")
"""Settings of which transformers writes infinity for a range without an end."""
DEEPEST = 64
"""Levels of a file's lists and objects; known ones have six."""
HALF = re.compile("[\ud800-\udfff]")
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",  # `check` counts parameters by it, without the weights.
)
WEIGHTS_FILE = "model.safetensors"
LARGEST_FILE = 256 << 20
"""Bytes of a file of settings or of a tokenizer: five times as many as known ones have."""
ALL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py")
HUB_WAIT_S = 20.0
"""Longest time that ``check`` waits for the Hub; a run waits as long as a download takes."""
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
    """A model's folder, and the settings in its configuration."""

    name: str
    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``; settings of its ``text_config`` (multimodal models) replace others."""
        whole = read_object(self.path / "config.json")
        text = whole.get("text_config")
        return {**whole, **(text if isinstance(text, dict) else {})}

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``; empty if there is none."""
        return read_object(self.path / "generation_config.json")

    @property
    def num_layers(self) -> int | None:
        """Number of transformer layers; None if the configuration does not say."""
        return self.config.get("num_hidden_layers", self.config.get("n_layer"))

    @property
    def vocab_size(self) -> int | None:
        """Rows of the output head, padding included; None if the configuration does not say."""
        return self.config.get("vocab_size")

    def shorter_context(self, tokens: int | None) -> int | None:
        """``tokens`` of a prompt and its answer where they are fewer than the model takes."""
        own = self.context_tokens
        return tokens if tokens is not None and (own is None or tokens < own) else None

    @property
    def context_tokens(self) -> int | None:
        """Context length of the model, in tokens; None if the configuration does not say.

        vLLM takes the smallest of the limits too, and multiplies it if the rope scaling is YaRN.
        """
        limits = [self.config[key] for key in CONTEXT_KEYS if self.config.get(key)]
        if not limits:
            return None
        longest = int(min(limits))
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if scaling.get("rope_type", scaling.get("type")) == "yarn":
            original = number(scaling.get("original_max_position_embeddings")) or longest
            factor = number(scaling.get("factor")) or 1
            longest = max(longest, int(original * factor))
        return longest

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, by the generation config, else by ``config.json``."""
        eos = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def has_weights(self) -> bool:
        """Whether the folder has safetensors files."""
        return any(self.path.glob("*.safetensors"))


@dataclass(frozen=True)
class ModelLookup:
    """The result of `find_model`: exactly one of the three is set.

    model: the model. problem: why there is no such model. notice: why it could not be checked now;
    the run will look for it again.
    """

    model: ModelFolder | None = None
    problem: str | None = None
    notice: str | None = None


def find_model(name: str, revision: str | None = None) -> ModelLookup:
    """Find the model's small files: in a local folder, in the cache, or else on the Hub."""
    folder = Path(resolve_input(name))
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # A name longer than a path may have, a folder that may not be read.
        return ModelLookup(problem=f"cannot be looked up ({error.strerror}); name another folder")
    if is_folder:
        if not (folder / "config.json").is_file():
            problem = f"the folder {name!r} has no config.json; name a model's folder"
            return ModelLookup(problem=problem)
        return ModelLookup(ModelFolder(name, folder))
    if folder.exists():
        problem = f"{name!r} is a file; name the folder with config.json and weights"
        return ModelLookup(problem=problem)
    if not looks_like_hub_id(name):
        return ModelLookup(
            problem=f"there is no folder {name!r} in {os.getcwd()}; run `make setup` if it is one "
            "of the shipped models, else name an existing folder or a Hugging Face id"
        )
    return _find_on_hub(name, revision)


def looks_like_hub_id(name: str) -> bool:
    """Whether ``name`` is ``owner/name`` or a bare name, and no path below a folder that exists."""
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~", "/")):
        return False
    return len(parts) == 1 or not Path(resolve_input(parts[0])).is_dir()


def fetch_model(name: str, revision: str | None = None) -> Path:
    """Return the folder of the whole model, with weights; downloads what is missing.

    Raises RunError if a download fails.
    """
    found = find_model(name, revision)
    if found.model is not None and Path(resolve_input(name)).is_dir():
        return found.model.path
    from huggingface_hub import snapshot_download

    if found.model is not None and found.model.path.parent.name == "snapshots":
        revision = found.model.path.name  # The commit that was checked; the branch may have moved.
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(ALL_FILES)))
    except Exception as error:
        raise RunError(f"{name!r} cannot be fetched from the Hugging Face Hub: {error}") from error


def read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read a JSON object of a model's folder, in which no value is `unfit`; {} without such a file.

    A broken file counts as {} too, unless ``strict``, which raises ConfigError. `check` reads a
    model's settings leniently, because `cluster.check.folders` and the tokenizer, which read
    strictly, report the folder.
    """
    try:
        value = json.loads(read_bounded(path, LARGEST_FILE).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if not strict:
            return {}
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        message = f"is not valid JSON ({reason}); fetch or save the model again"
        raise config_error(str(path), message) from None
    found = unfit(value)
    if isinstance(value, dict) and found is None:
        return value
    if not strict:
        return {}
    message = f"is a {type(value).__name__}, expected an object"
    if found is not None:
        keys, wrong = found
        message = f"has {wrong}" + (f" at {shown_value('.'.join(keys), 80)}" if keys else "")
    raise config_error(str(path), f"{message}; fetch or save the model again")


Unfit = tuple[list[str], str]


def unfit(value: Any, depth: int = 0) -> Unfit | None:
    """What no file of a model holds, anywhere in a value of JSON: its keys, and what it is.

    That is: a number that is not finite or that neither 64 bits nor float32 have, a text with half
    a surrogate pair, which is no Unicode and which tokenizers refuse with an error of Python's
    types, and lists and objects without end in each other. Where a range is left open, infinity
    stands for it.
    """
    if isinstance(value, str):
        return None if value.isascii() or not HALF.search(value) else ([], half_in(value))
    if isinstance(value, float):
        if abs(value) <= LARGEST_FLOAT:  # NaN is in no order.
            return None
        return [], f"the number {value:g}, expected a finite one that float32 has"
    if isinstance(value, int):
        if abs(value) <= LARGEST_INTEGER or value == NO_LIMIT:
            return None
        return [], f"{shown_value(value, 80)}, expected an integer of at most 64 bits"
    if not isinstance(value, dict | list):
        return None
    if depth >= DEEPEST:
        return [], f"lists and objects in each other, more than {DEEPEST} deep"
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(key, str) and not key.isascii() and HALF.search(key):
            return [], half_in(key)
        if key in LIMITS and isinstance(one, list):
            one = [number for number in one if number != math.inf]
        if (found := unfit(one, depth + 1)) is not None:
            return [str(key), *found[0]], found[1]
    return None


def half_in(text: str) -> str:
    """What is wrong with a text in which `HALF` finds one, for a message.

    Nothing around it is quoted: of a secret that is cut nobody knows any more that it is one.
    """
    found = HALF.search(text)
    assert found is not None
    place = f"a text whose character {found.start() + 1:,} is {found[0]!r}"
    return f"{place}, half of a surrogate pair, which is no Unicode"


def _find_on_hub(name: str, revision: str | None) -> ModelLookup:
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
            return ModelLookup(ModelFolder(name, cached))
    except HFValidationError:
        problem = f"{name!r} is neither an existing folder nor a Hugging Face id"
        return ModelLookup(problem=problem)
    except Exception:  # Not in the cache, for which huggingface_hub raises several types.
        pass
    if HF_HUB_OFFLINE:
        return ModelLookup(
            problem=f"{name!r} is neither an existing folder nor in the Hugging Face cache, and "
            "HF_HUB_OFFLINE is set; unset it, or name a local folder"
        )
    results: list[Path | BaseException] = []

    def try_download() -> None:
        try:
            results.append(download(offline=False))
        except BaseException as error:
            results.append(error)

    # In a daemon thread: without a network the Hub's client retries for longer than a person who
    # waits for `check` should, and cannot be stopped.
    thread = threading.Thread(target=try_download, name="hub", daemon=True)
    thread.start()
    thread.join(HUB_WAIT_S)
    result = results[0] if results else TimeoutError(f"no answer in {HUB_WAIT_S:.0f} s")
    if isinstance(result, Path):
        return ModelLookup(ModelFolder(name, result))
    if isinstance(result, RepositoryNotFoundError):
        return ModelLookup(
            problem=f"{name!r} is neither an existing folder nor on the Hugging Face Hub (or it is "
            "private: log in with `hf auth login`)"
        )
    reason = str(result).splitlines()[0] if str(result) else type(result).__name__
    return ModelLookup(notice=f"{name!r} was not checked, the Hub does not answer now ({reason})")
