"""The teacher's sampling settings, with unset ones taken from the model's own folder.

The keys of answers, the manifest, the engine and the finished student's generation config all use
the one `ResolvedSampling` made here. Imports neither Ray, vLLM nor torch.
"""

import hashlib
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from raystill.base.records import read_bounded
from raystill.config.teacher import TeacherConfig
from raystill.model.files import LARGEST_FILE, read_object
from raystill.model.tokenizer import token_text


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling settings, all of them set. They decide an answer's tokens, not their signal.

    A field that is added needs a default, with which answers are as they were without it.
    """

    temperature: float
    top_p: float
    top_k: int  # 0: all ids.
    min_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]  # Each of them ends an answer; no other id does.

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in JSON's types."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}

    def keyed(self) -> dict[str, Any]:
        """Return the settings that keys cover: of those with a default, the ones that differ."""
        values = ((one, getattr(self, one.name)) for one in fields(self))
        return {
            one.name: value
            for one, value in values
            if one.default is MISSING or value != one.default
        }


def resolve_sampling(teacher: TeacherConfig, model_folder: str | PathLike[str]) -> ResolvedSampling:
    """Fill unset fields of ``teacher.sampling`` from the folder's ``generation_config.json``.

    A setting that is in neither is neutral: temperature 1, every id allowed. ``do_sample`` and
    repetition penalties of that file are ignored, since distillation needs samples of the teacher's
    own distribution.

    The ids that end an answer are those of `own_stop_ids`. The synthetic engine has no folder; its
    last id ends its answers. Raises ConfigError if a file of the folder is broken.
    """
    configured = teacher.sampling
    folder = Path(model_folder)
    defaults = read_object(folder / "generation_config.json", strict=True)

    def resolve(name: str, neutral: float) -> float:
        value = getattr(configured, name)
        if value is None:
            value = defaults.get(name)
        return neutral if value is None else value

    if configured.stop_token_ids is not None:
        stop_ids = configured.stop_token_ids
    elif teacher.engine == "synthetic":
        stop_ids = (teacher.synthetic.vocab_size - 1,)
    else:
        stop_ids = own_stop_ids(folder)
    return ResolvedSampling(
        temperature=float(resolve("temperature", 1.0)),
        top_p=float(resolve("top_p", 1.0)),
        top_k=max(0, int(resolve("top_k", 0))),  # transformers writes "all ids" as 0, vLLM as -1.
        min_p=float(resolve("min_p", 0.0)),
        max_tokens=configured.max_tokens,
        stop_token_ids=tuple(stop_ids),
    )


def own_stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end an answer by the model's own files, without duplicates.

    First the ``eos_token_id`` of the generation config, else of ``config.json``; then the
    tokenizer's end token.
    """
    eos = read_object(folder / "generation_config.json", strict=True).get("eos_token_id")
    if eos is None:
        config = read_object(folder / "config.json", strict=True)
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ids = [] if eos is None else ([eos] if isinstance(eos, int) else list(eos))
    ids += _tokenizer_eos(folder)
    return tuple(dict.fromkeys(int(i) for i in ids))


def _tokenizer_eos(folder: Path) -> list[int]:
    """Return the id of the tokenizer's end token, with which chat models end a turn."""
    token = token_text(read_object(folder / "tokenizer_config.json", strict=True).get("eos_token"))
    if token is None:
        return []
    path = folder / "tokenizer.json"
    try:
        content = read_bounded(path, LARGEST_FILE)
    except OSError:
        content = b""  # read_object says what is wrong.
    index = _index_of(path, hashlib.sha256(content).digest(), token)
    return [] if index is None else [index]


@lru_cache(maxsize=4)
def _index_of(path: Path, digest: bytes, token: str) -> int | None:
    """A token's id by a ``tokenizer.json`` of this content: a check asks a few times, of 4 MB."""
    tokenizer = read_object(path, strict=True)
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
    if token in added:
        index: int = added[token]
        return index
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    # A unigram tokenizer's vocabulary is a list of pairs; its end token is an added one.
    return vocabulary.get(token) if isinstance(vocabulary, dict) else None
