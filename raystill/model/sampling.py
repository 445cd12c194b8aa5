"""How the teacher draws its answers, with every open setting filled in from its own folder.

Where it sits: the answer keys, the manifest, the engine and the finished student's generation
config all use the one ``ResolvedSampling`` made here. Imports neither Ray, vLLM nor torch.
"""

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from raystill.config.teacher import TeacherConfig


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling with nothing left open. It chooses contexts only; the signal is untempered."""

    temperature: float
    top_p: float
    top_k: int  # 0: all ids
    min_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]  # any of them ends an answer; no other id does

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}


def resolve_sampling(teacher: TeacherConfig, model_folder: str | PathLike[str]) -> ResolvedSampling:
    """Fill what ``teacher.sampling`` leaves open from the folder's ``generation_config.json``.

    What that file leaves open too is neutral: temperature 1, every id allowed. ``do_sample`` and
    repetition penalties there are ignored, as distillation wants draws from the teacher itself.
    Ids that end an answer: every eos the generation config (else ``config.json``) names, and the
    tokenizer's own. The synthetic engine has no folder: its last id ends its answers.
    """
    asked = teacher.sampling
    folder = Path(model_folder)
    own = _read_json(folder / "generation_config.json")

    def pick(name: str, neutral: float) -> float:
        value = getattr(asked, name)
        if value is None:
            value = own.get(name)
        return neutral if value is None else value

    if asked.stop_token_ids is not None:
        stop_ids = asked.stop_token_ids
    elif teacher.engine == "synthetic":
        stop_ids = (teacher.synthetic.vocab_size - 1,)
    else:
        stop_ids = own_stop_ids(folder)
    return ResolvedSampling(
        temperature=float(pick("temperature", 1.0)),
        top_p=float(pick("top_p", 1.0)),
        top_k=max(0, int(pick("top_k", 0))),
        min_p=float(pick("min_p", 0.0)),
        max_tokens=asked.max_tokens,
        stop_token_ids=tuple(stop_ids),
    )


def own_stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids by which the model itself ends an answer, in the order they are named."""
    named = _read_json(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        config = _read_json(folder / "config.json")
        named = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ids = [] if named is None else ([named] if isinstance(named, int) else list(named))
    ids += _tokenizer_eos(folder)
    return tuple(dict.fromkeys(int(i) for i in ids))


def _tokenizer_eos(folder: Path) -> list[int]:
    """The id of the tokenizer's end token, which chat models use to end a turn."""
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return []
    tokenizer = _read_json(folder / "tokenizer.json")
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
    if token in added:
        return [added[token]]
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return [vocabulary[token]] if isinstance(vocabulary, dict) and token in vocabulary else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the model again") from error
