"""Keeps the teacher's control tokens out of what a prompt says.

A chat template writes control tokens (``<|im_end|>``) around the messages, as text that the
tokenizer then reads. Whoever writes such a text into a message would write a turn of their own. So
in the messages each one is replaced by a mark, a character that no prompt has, and the template is
rendered; what stands between the marks is tokenised as ever, and a mark as the plain text it stands
for. A prompt without such a text is tokenised in one piece, as it always was.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

PRIVATE = (0xF0000, 0x100000)
"""Where the two planes begin whose characters Unicode leaves to private agreement."""
PLANE = 0xFFFE
SHOWN = 3


class ControlTokens:
    """The control tokens of a tokenizer, and how many prompts hold them as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {index for index, token in added.items() if token.special}
        texts = {token.content for token in added.values() if token.special and token.content}
        self._texts = sorted(texts, key=lambda text: (-len(text), text))
        self._any = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._plain: dict[str, list[int]] = {}
        self.found: Counter[str] = Counter()
        self.num_prompts = 0

    def in_messages(self, messages: list[dict[str, Any]]) -> bool:
        """Whether messages hold a control token, in one text or in several that follow another."""
        texts = list(texts_of(messages))
        names = set(self._any.findall("".join(texts)))
        if names:
            self.num_prompts += 1
            self.found.update(names)
        return bool(names)

    def encode(
        self, messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]
    ) -> list[int]:
        """Ids of messages that hold control tokens. ``render``: the chat template, to a text.

        Raises ValueError for messages that use all private characters too.
        """
        said = "".join(texts_of(messages))
        free = [
            start for start in PRIVATE if not any(start <= ord(c) < start + PLANE for c in said)
        ]
        if not free:
            raise ValueError("holds control tokens of the teacher beside private characters")
        start = free[
            0
        ]  # The first character is a border: no token begins before it and ends after.
        marks = {text: chr(start + 1 + i) for i, text in enumerate(self._texts[: PLANE - 2])}
        border = chr(start)

        def marked(text: str) -> str:
            return border + self._any.sub(lambda found: marks.get(found[0], border), text)

        rendered = render([with_texts(message, marked) for message in messages])
        of_mark = {mark: text for text, mark in marks.items()}
        parts = re.split(f"([{border}-{chr(start + PLANE - 1)}])", rendered)
        ids: list[int] = []
        piece = ""
        for number, part in enumerate(parts):
            if number % 2 == 0:
                piece = part
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids if piece else []
            elif part in of_mark:
                ids += self._as_text(of_mark[part])
        return ids

    def notice(self) -> str | None:
        """One sentence on the prompts that hold control tokens; None if there are none."""
        if not self.num_prompts:
            return None
        names = [name for name, _ in self.found.most_common(SHOWN)]
        more = ", ..." if len(self.found) > SHOWN else ""
        return (
            f"{self.num_prompts:,} prompts hold control tokens of the teacher "
            f"({', '.join(names)}{more}): they are read as text, and end no turn"
        )

    def _as_text(self, text: str) -> list[int]:
        """Ids of a control token's text, none of which is a control token."""
        if text not in self._plain:
            before = self._tokenizer.encode_special_tokens
            self._tokenizer.encode_special_tokens = True
            try:
                ids = self._tokenizer.encode(text, add_special_tokens=False).ids
                if self._ids & set(ids):  # A vocabulary that has it as an ordinary piece too.
                    alone = (self._tokenizer.encode(c, add_special_tokens=False).ids for c in text)
                    ids = [index for of_one in alone for index in of_one]
            finally:
                self._tokenizer.encode_special_tokens = before
            self._plain[text] = [index for index in ids if index not in self._ids]
        return self._plain[text]


def texts_of(value: Any) -> Iterator[str]:
    """All texts of messages, however deep; keys and roles, which are checked, are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "type"):
                yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all its texts changed; see `texts_of`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            name: inner if name in ("role", "type") else with_texts(inner, change)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [with_texts(inner, change) for inner in value]
    return value
