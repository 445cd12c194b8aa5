"""Reads a chat back out of the ids of a prompt, which is all that the teacher store keeps of it.

A chat template puts fixed texts around each message. They are learned by rendering chats of
markers, and a prompt's text is then cut at them. What comes out is kept only if rendering and
tokenising it again gives exactly the same ids, so a chat is either right or reported as unreadable.

Imports neither Ray nor torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.tokenise import PromptTokeniser, TemplateRefusal

MARKS = ("qzUSERAqz", "qzANSWERqz", "qzUSERBqz", "qzSYSTEMqz")
"""Contents that no template changes: ASCII letters, without spaces at the ends."""

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class _Pattern:
    """Texts around the messages: ``head`` user ``answer`` assistant ``turn`` user ``tail``.

    With a system message the chat begins with ``system``, and ``after`` stands behind the message.
    """

    head: str
    tail: str
    answer: str | None = None
    turn: str | None = None
    system: str | None = None
    after: str | None = None


class ChatReader:
    """The chats behind prompt ids, of one model's template."""

    def __init__(self, tokeniser: PromptTokeniser) -> None:
        self._tokeniser = tokeniser
        added = tokeniser.tokenizer.get_added_tokens_decoder().values()
        self.control_tokens = [token.content for token in added if token.special]
        self._pattern = self._learn()

    def read(self, prompts: list[np.ndarray]) -> list[Chat | None]:
        """The chat of each prompt [P]; None where no chat renders to exactly these ids."""
        candidates = [self._candidates(ids) for ids in prompts]
        flat = [(i, chat) for i, chats in enumerate(candidates) for chat in chats]
        found: list[Chat | None] = [None] * len(prompts)
        ids = self._tokeniser.encode_many([_raw(chat) for _, chat in flat])
        for (i, chat), rendered in zip(flat, ids, strict=True):
            if found[i] is None and np.array_equal(rendered, prompts[i]):
                found[i] = chat
        return found

    def text(self, ids: np.ndarray) -> str:
        """The text of ids, control tokens included."""
        return str(self._tokeniser.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _candidates(self, ids: np.ndarray) -> list[Chat]:
        """Chats that may be behind these ids and render to their text."""
        pattern, text = self._pattern, self.text(ids)
        if pattern is None or not text.endswith(pattern.tail):
            return []
        body = text[: len(text) - len(pattern.tail)]
        chats: list[Chat] = []
        if body.startswith(pattern.head):
            chats += self._turns(body[len(pattern.head) :])
        if pattern.system is not None and body.startswith(pattern.system):
            system, found, rest = body[len(pattern.system) :].partition(pattern.after or "")
            said = [{"role": "system", "content": system}]
            chats += [said + turns for turns in self._turns(rest)] if found else []
        return [chat for chat in chats if self._renders(chat) == text]

    def _turns(self, body: str) -> list[Chat]:
        """Chats of user and assistant in turn: cut at all of the template's texts, or at none.

        A message may hold these texts itself, and the cuts then make no chat.
        """
        answer, turn = self._pattern.answer, self._pattern.turn  # type: ignore[union-attr]
        whole, cut = [{"role": "user", "content": body}], []
        while answer and turn and answer in body:
            user, _, body = body.partition(answer)
            said, found, body = body.partition(turn)
            if not found:
                return [whole]
            cut += [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
        return [[*cut, {"role": "user", "content": body}], whole][: 2 if cut else 1]

    def _learn(self) -> _Pattern | None:
        """The template's texts; None where it does not show a lone user's message as it is."""
        user, answer, again, system = MARKS
        alone = self._around([("user", user)])
        if alone is None:
            return None
        head, tail = alone
        several = self._around([("user", user), ("assistant", answer), ("user", again)])
        turns = several[1:3] if several and (several[0], several[3]) == (head, tail) else None
        instructed = self._around([("system", system), ("user", user)])
        begins = instructed[:2] if instructed and instructed[2] == tail else None
        return _Pattern(head, tail, *(turns or (None, None)), *(begins or (None, None)))

    def _around(self, chat: list[tuple[str, str]]) -> list[str] | None:
        """The texts before, between and after the contents of a chat; None if one is not there."""
        text = self._renders([{"role": role, "content": mark} for role, mark in chat])
        parts = []
        for _, mark in chat:
            if text is None or text.count(mark) != 1:
                return None
            before, _, text = text.partition(mark)
            parts.append(before)
        return [*parts, text or ""]

    def _renders(self, chat: Chat) -> str | None:
        try:
            return self._tokeniser.render(_raw(chat))
        except TemplateRefusal:
            return None


def _raw(chat: Chat) -> RawPrompt:
    return RawPrompt(None, chat, "", "")
