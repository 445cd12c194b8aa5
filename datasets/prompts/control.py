"""Keeps the teacher's control tokens out of what a prompt says.

A chat template writes control tokens (``<|im_end|>``) around the messages, as text that the
tokenizer then reads. Whoever wrote such a text into a message, or pieces that the template joins to
one, would write a turn of their own. What the template wrote cannot be told from the text alone. So
a prompt that could hold one is rendered twice: as it is, and with marks, private characters, in the
place of those characters of its messages that a control token needs. In the second text all control
tokens are the template's. If the first has the same ones, it is tokenised as ever. Else the second
is: the template's control tokens get secret names, the marks become what they stand for, and a
tokenizer reads the text that knows control tokens by these names only.

Which prompts could hold one is decided by their characters, so that most are rendered once.

Legend: T control tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Encoding, Tokenizer

from raystill.model.tokenizer import PLANE, PRIVATE, TAG, ControlTokens, PlainText, SharedTokenizer

SHOWN = 3
SAID_BY_MODEL = "assistant"
WORDS = ("content", "reasoning_content", "reasoning", "thinking")
"""Fields of the model's own words, which may hold its tags."""
MAKERS = re.compile(r"\b(lower|upper|title|capitalize|striptags|swapcase|format)\b")
"""What makes other characters of a text than it has, in a template."""

Message = dict[str, Any]


@dataclass
class Marked:
    """A rendered chat with marks.

    marks: the character that each stands for. said: all texts of the chat.
    """

    text: str
    marks: dict[str, str]
    said: str

    def unmarked(self, text: str) -> str:
        """A part of it as its writer wrote it; marks that the template escaped are found too."""
        return self._any_mark.sub(lambda found: self._spelt[found[0]], text)

    def is_of(self, text: str) -> bool:
        """Whether it is this text, if no mark was escaped."""
        return self.text.translate({ord(mark): said for mark, said in self.marks.items()}) == text

    @cached_property
    def _spelt(self) -> dict[str, str]:
        return {form: said for mark, said in self.marks.items() for form in _spellings(mark)}

    @cached_property
    def _any_mark(self) -> re.Pattern[str]:
        return re.compile(_alternatives(self._spelt))


@dataclass
class Found:
    """How often prompts, or given responses, held control tokens as text."""

    num: int = 0
    names: Counter[str] = field(default_factory=Counter)

    def add(self, names: Iterable[str]) -> None:
        """One more, which holds these."""
        self.num += 1
        self.names.update(set(names))

    def notice(self, what: str) -> str:
        """One sentence on them."""
        names = [name for name, _ in self.names.most_common(SHOWN)]
        more = ", ..." if len(self.names) > SHOWN else ""
        return (
            f"{self.num:,} {what} hold control tokens of the teacher ({', '.join(names)}{more}): "
            "they are read as text, and end no turn"
        )


class ControlGuard:
    """Tells text of prompts and responses from control tokens, for one tokenizer and template."""

    def __init__(
        self, shared: SharedTokenizer, control: ControlTokens, template: str | None
    ) -> None:
        self._shared = shared
        tokenizer = shared.tokenizer
        self._control = control
        added = tokenizer.get_added_tokens_decoder()
        self._texts = {index: added[index].content for index in control.all}
        # Others are looked for in normalised text, which may hide one that the template wrote.
        normalised = tokenizer.normalizer is not None and any(
            added[index].normalized for index in control.all
        )
        self._as_spelt = not normalised
        self._of_text = {text: index for index, text in self._texts.items()}
        self._any = re.compile(_alternatives(self._of_text))
        self._unknown = _unknown_ids(tokenizer, self._texts)
        self._normalise: Callable[[str], str] | None = (
            None if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
        )
        self._made: dict[str, str] = {}
        literals = [] if template is None else template_literals(template)
        self._makes = template is not None and MAKERS.search(template) is not None
        tags = {text.strip() for text in literals if TAG.fullmatch(text.strip())}
        tags -= {self._texts[index] for index in control.always}
        tags |= {self._texts[index] for index in control.tags}
        self._tags = re.compile(f"({_alternatives(tags)})")
        self._needs, self._between = _needed(self._texts.values(), literals)
        self._longest = max(map(len, self._texts.values()), default=0)
        self._ends = {text[i] for text in self._texts.values() for i in (0, -1)}
        self._ends |= {c for t in self._texts.values() for c in t if not c.isalnum()}
        self._ends -= {c for c in self._ends if c.isspace()}
        self.prompts, self.responses = Found(), Found()

    def possible(self, messages: list[Message]) -> bool:
        """Whether a control token may come from these messages, whatever the template does."""
        texts = list(texts_of(messages, keys=True))
        characters = set("".join(texts))
        if self._makes:
            characters |= set("".join(t.lower() + t.upper() + t.title() for t in texts))
        if self._normalise is not None:
            characters |= {made for c in characters for made in self._normalised(c)}
        if any(need <= characters for need in self._needs):
            return True
        return bool(self._between) and any(self._is_between(text) for text in texts)

    def _is_between(self, text: str) -> bool:
        """Whether a text is what lacks between two literals of the template."""
        if len(text) > 4 * self._longest:  # Longer than any form of a control token.
            return False
        forms = {text} | ({text.lower(), text.upper(), text.title()} if self._makes else set())
        if self._normalise is not None:
            forms |= {self._normalise(form) for form in forms}
        said = {form.strip(" \t\n\r\u2581") for form in forms} - {""}
        return any(form in lacking for form in said for lacking in self._between)

    def mark(self, messages: list[Message], render: Callable[[list[Message]], str]) -> Marked:
        """The chat rendered with marks. ``render``: the chat template, to a text.

        Raises ValueError for messages that leave no private character free.
        """
        free = _free_characters(set("".join(texts_of(messages, keys=True))))
        marks: dict[str, str] = {}

        def mark_of(character: str) -> str:
            if character not in marks:
                if (mark := next(free, None)) is None:
                    raise ValueError(
                        "holds control tokens of the teacher beside private characters"
                    )
                marks[character] = mark
            return marks[character]

        def marked(text: str) -> str:
            whole = self._is_between(text)
            needed = [c for c in set(text) if whole or self._is_end(c)]
            return text.translate({ord(c): mark_of(c) for c in needed})

        def marked_but_tags(text: str) -> str:
            parts = self._tags.split(text)
            return "".join(p if i % 2 else marked(p) for i, p in enumerate(parts))

        def change(message: Message) -> Message:
            changed: Message = with_texts(message, marked, keys=True)
            if message.get("role") == SAID_BY_MODEL:
                words = {name: message[name] for name in WORDS if name in message}
                changed |= with_texts(words, marked_but_tags, keys=True)
            return changed

        rendered = render([change(message) for message in messages])
        said = "".join(texts_of(messages, keys=True))
        return Marked(rendered, {mark: character for character, mark in marks.items()}, said)

    def _is_end(self, character: str) -> bool:
        """Whether it, or what the normaliser makes of it, is one that control tokens need."""
        if character in self._ends:
            return True
        return not self._ends.isdisjoint(self._normalised(character))

    def _normalised(self, character: str) -> str:
        """What the normaliser makes of a character; nothing without one."""
        if self._normalise is None:
            return ""
        if (made := self._made.get(character)) is None:
            made = self._made[character] = self._normalise(character)
        return made

    def settle(self, text: str | None, ids: list[int] | None, marked: Marked) -> list[int]:
        """Ids of a prompt that may hold control tokens.

        text, ids: the chat as it is, rendered, and what the tokenizer makes of it; None where the
        template refuses it so. Raises ValueError where text cannot be told from control tokens.
        """
        theirs = [] if ids is None else self._control_in(ids)
        if (
            self._as_spelt
            and text is not None
            and marked.is_of(text)
            and theirs == self._written(marked.text)
        ):
            unknown = self._unknown.values()
            if all(text.count(spelt) == marked.text.count(spelt) for spelt in unknown):
                return ids or []
        encoding = self._shared.tokenizer.encode(marked.text, add_special_tokens=False)
        own = self._control_in(encoding.ids)
        if text is None or ids is None:
            self.prompts.add(spelt for spelt in self._texts.values() if spelt in marked.said)
        else:
            more = Counter(theirs) - Counter(own)
            names = {self._texts[index] for index in more}
            unknown = self._unknown.values()
            names |= {t for t in unknown if text.count(t) != marked.text.count(t)}
            if names:
                self.prompts.add(names)
            elif text == marked.unmarked(marked.text) and theirs == own:
                return ids
        plain = self.plain(self._control.all)
        settled = plain.encode(self._named(encoding, marked, plain))
        if self._control_in(settled) != own:
            raise ValueError("holds control tokens of the teacher that cannot be read as text")
        return settled

    def _written(self, text: str) -> list[int]:
        """Control tokens that stand in a text as they are spelt, without that of the unknown."""
        found = (self._of_text[spelt] for spelt in self._any.findall(text))
        return [index for index in found if index not in self._unknown]

    def _named(self, encoding: Encoding, marked: Marked, plain: PlainText) -> str:
        """The marked text with the template's control tokens under their secret names, unmarked."""
        parts, done = [], 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelt = self._texts.get(index)
            if spelt is None or (index in self._unknown and spelt not in marked.text[start:end]):
                continue
            parts += [marked.unmarked(marked.text[done:start]), plain.names[index]]
            done = end
        return "".join([*parts, marked.unmarked(marked.text[done:])])

    def _control_in(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among ids, without the one for characters that no vocabulary has."""
        return [i for i in ids if i in self._texts and i not in self._unknown]

    def response(self, ids: list[int], text: str) -> list[int]:
        """Ids of an answer in words; ``ids``: what the tokenizer makes of its text."""
        found = self._control.always.intersection(ids)
        if not found:
            return ids
        plain = self.plain(self._control.always).encode(text)
        if plain != ids:
            self.responses.add(self._texts[index] for index in found)
        return plain

    def plain(self, control: frozenset[int]) -> PlainText:
        """The tokenizer for which these control tokens are text."""
        return self._shared.plain_text(control)

    def notices(self) -> list[str]:
        """A sentence on the prompts and one on the given responses that hold control tokens."""
        found = [(self.prompts, "prompts"), (self.responses, "given responses")]
        return [of.notice(what) for of, what in found if of.num]


def template_literals(template: str) -> list[str]:
    """The texts that stand in a chat template: between its tags, and quoted in them."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    literals = []
    for _, kind, value in environment.lex(template):
        if kind == "data":
            literals.append(value)
        elif kind == "string":
            quoted = value[1:-1].encode("ascii", "backslashreplace")
            literals.append(quoted.decode("unicode-escape", "replace"))
    return literals


def _needed(
    tokens: Collection[str], literals: Iterable[str]
) -> tuple[list[frozenset[str]], set[str]]:
    """What messages must have before the template can make a control token with their help.

    First sets of characters, of which all of one must be there: those of a token, without what a
    literal may bring at its beginning, at its end, or within. Then texts that stand between two
    literals in a token: these would be short words, which are looked for as such.
    """
    longest = max(map(len, tokens), default=0)
    begins, ends, within = set(), set(), set()
    for literal in literals:
        begins |= {literal[:n] for n in range(1, min(longest, len(literal) + 1))}
        ends |= {literal[-n:] for n in range(1, min(longest, len(literal) + 1))}
        within |= {literal} if 0 < len(literal) < longest else set()
    needs, between = set(), set()
    for token in tokens:
        cuts = range(1, len(token))
        heads = [n for n in cuts if token[:n] in ends]
        tails = [n for n in cuts if token[n:] in begins]
        needs.add(frozenset(token))
        needs |= {frozenset(token[n:]) for n in heads} | {frozenset(token[:n]) for n in tails}
        needs |= {frozenset(token.replace(t, "")) for t in within if t in token and t != token}
        between |= {token[head:tail] for head in heads for tail in tails if head < tail}
    return _least(needs - {frozenset()}), between


def _least(sets: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """The sets that contain none of the others."""
    least: list[frozenset[str]] = []
    for candidate in sorted(sets, key=len):
        if not any(known <= candidate for known in least):
            least.append(candidate)
    return least


def _unknown_ids(tokenizer: Tokenizer, texts: dict[int, str]) -> dict[int, str]:
    """The control token that stands for characters without a token, by its id; mostly none."""
    ids = tokenizer.encode(chr(PRIVATE[0]), add_special_tokens=False).ids
    return {index: texts[index] for index in ids if index in texts}


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern for any of these texts, the longest first; nothing matches it if there is none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


def _free_characters(said: set[str]) -> Iterator[str]:
    """Private characters that are not among those said."""
    for start in PRIVATE:
        for code in range(start, start + PLANE):
            if chr(code) not in said:
                yield chr(code)


def _spellings(mark: str) -> set[str]:
    """A mark as it is, and as JSON in ASCII and Python's representation escape it."""
    return {mark, json.dumps(mark)[1:-1], repr(mark)[1:-1]}


def texts_of(value: Any, keys: bool = False) -> Iterator[str]:
    """All texts of messages, however deep; roles, which are checked, are left out.

    keys: also the names of fields, and types.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if keys:
                yield str(name)
            if name != "role" and (keys or name != "type"):
                yield from texts_of(inner, keys)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner, keys)


def with_texts(value: Any, change: Callable[[str], str], keys: bool = False) -> Any:
    """The value with all its texts changed; see `texts_of`. Names that are words stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change(str(name)) if keys and not str(name).isidentifier() else name: (
                with_texts(inner, change, keys)
                if name != "role" and (keys or name != "type")
                else inner
            )
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [with_texts(inner, change, keys) for inner in value]
    return value
