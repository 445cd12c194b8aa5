"""What a judge is asked of an answer, and how its reply becomes a score.

Where it sits: `stream.judging` asks a teacher; `check` looks whether one can be asked. The question
is a chat of one message: the rubric, the request, fields of the prompt file, the answer, and the
words that may be replied. It goes through the judge's own chat template, as every prompt does, so
that nothing in an answer ends a turn. Imports neither Ray nor torch.

Legend: K ids with logprobs, P tokens of a question.
"""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from raystill.base.errors import ConfigError, Problem
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.config.teacher import JudgeConfig
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.signal import Signal
from raystill.model.tokenizer import chat_template, read_settings

NO_VERDICT = "no verdict"
"""Why an answer has no score: the judge replied with none of its words."""
WIDEST = 20
"""Ids with logprobs that are asked for of the reply's first token; servers mostly give no more."""
Message = dict[str, Any]


class Judging:
    """The questions of one judge of the filters, and what its replies say.

    A judge without a chat template is asked in plain text.

    Raises ConfigError where the judge's tokenizer cannot tell its words by their first token.
    """

    def __init__(self, config: JudgeConfig, run: RunConfig, folder: Path) -> None:
        """run: as the judge has it. folder: with its tokenizer."""
        self.config = config
        self.signal = verdict_signal(run)
        self._chats = chat_template(folder, read_settings(folder)) is not None
        own = {"system": None, "chat_template": self._chats}
        prompts: PromptsConfig = run.prompts.model_copy(update=own)
        self._tokeniser = PromptTokeniser(folder, prompts)
        self._ids: dict[int, float] = {}
        if self.signal.kind != "text":
            self._ids = verdict_ids(config.verdicts, self._tokeniser.tokenizer)
        self._words = {word.casefold(): value for word, value in config.verdicts.items()}

    def chat(self, request: Sequence[Message], answer: str, fields: Mapping[str, Any]) -> Message:
        """The question on one answer, as the only message of a chat.

        Each part stands between marks that its own text makes, so that no answer can write the end
        of its part and go on as the one who asks.
        """
        parts = [self.config.rubric, _part("request", in_words(request))]
        parts += [_part(name, as_text(fields[name])) for name in self.config.columns]
        words = ", ".join(self.config.verdicts)
        parts += [_part("answer", answer), f"Reply with one of these words alone: {words}."]
        return {"role": "user", "content": "\n\n".join(parts)}

    def encode(self, chat: Message) -> NDArray[np.int32]:
        """Token ids int32 [P] of a question; none where it cannot be put into the template."""
        try:
            text, chats = (None, [chat]) if self._chats else (chat["content"], None)
            return self._tokeniser.encode(RawPrompt(text, chats, "judge", "a question"))
        except ConfigError:
            return np.empty(0, np.int32)

    def scores(self, replies: pa.Table) -> list[float | str]:
        """The score of each reply (answer_schema), or why there is none."""
        told: list[float | str] = []
        for reply, error in zip(self._read(replies), replies["error"].to_pylist(), strict=True):
            told.append(reply if error is None else str(error))
        return told

    def _read(self, replies: pa.Table) -> list[float | str]:
        if self.signal.kind == "text":
            decode = self._tokeniser.tokenizer.decode
            return [self._of_text(decode(ids or [])) for ids in replies["response_ids"].to_pylist()]
        both = (replies[name].to_pylist() for name in ("topk_ids", "topk_logprobs"))
        return [
            self._of_first(ids[0], logprobs[0]) if ids else NO_VERDICT
            for ids, logprobs in zip(*both, strict=True)
        ]

    def _of_text(self, text: str) -> float | str:
        """The value of the first word."""
        word = re.search(r"\w+", text)
        return NO_VERDICT if word is None else self._words.get(word[0].casefold(), NO_VERDICT)

    def _of_first(self, ids: Sequence[int], logprobs: Sequence[float]) -> float | str:
        """Expected value of the verdict by the first token's logprobs [K], nats.

        sum_v p(v) x value(v) / sum_v p(v), over the words v; those outside the K best count as 0.
        """
        pairs = [
            (self._ids[i], np.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i in self._ids
        ]
        share = float(sum(p for _, p in pairs))
        if share < self.config.min_verdict_share:
            return NO_VERDICT
        return float(sum(value * p for value, p in pairs)) / share


def verdict_signal(run: RunConfig) -> Signal:
    """What is wanted of a judge's reply; run: as the judge has it."""
    if run.teacher.gives_text_only:
        return Signal("text")
    return Signal("topk", min(WIDEST, max(run.signal.top_k, run.evaluation.top_k)))


def verdict_ids(verdicts: Mapping[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Token ids that say a word at the beginning of a reply, with its value.

    A word may be written with a space before it and with large letters; each form that is one token
    counts. Raises ConfigError for a word that has none.
    """
    found: dict[int, float] = {}
    for word, value in verdicts.items():
        forms = {
            form
            for one in (word, word.capitalize(), word.upper(), word.lower())
            for form in (one, f" {one}")
        }
        ids = [tokenizer.encode(form, add_special_tokens=False).ids for form in sorted(forms)]
        mine = {one[0] for one in ids if len(one) == 1}
        if not mine:
            raise ConfigError(
                [
                    Problem(
                        "verdicts",
                        f"has {word!r}, which is no single token of the "
                        "judge's tokenizer; use a shorter word, such as yes or 1",
                    )
                ]
            )
        found |= dict.fromkeys(mine, value)
    return found


def in_words(request: Sequence[Message]) -> str:
    """A chat as text: of a single message its words, else who said what."""
    texts = [(str(one.get("role", "")), as_text(one.get("content"))) for one in request]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {said}" for role, said in texts)


def as_text(value: Any) -> str:
    """A field as a judge reads it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _part(name: str, text: str) -> str:
    """A part of the question between its marks, which hold a hash of the text."""
    said = text.encode("utf-8", "replace")  # A field may hold half a surrogate pair.
    mark = f"{name}-{blake2b(said, digest_size=4).hexdigest()}"
    return f"<{mark}>\n{said.decode()}\n</{mark}>"
