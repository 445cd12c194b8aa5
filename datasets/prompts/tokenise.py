"""Turn prompts into token ids, equal to those of ``transformers``, without importing it or torch.

``check`` has five seconds and runs on machines without torch, so this reads ``tokenizer.json`` and
renders the chat template itself. Tests compare the ids with those of ``AutoTokenizer``.
"""

import os
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from raystill.base.errors import ConfigError, Problem, config_error
from raystill.base.personal import mask
from raystill.base.redact import shown_value
from raystill.base.user_function import TookTooLong, within
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.control import ControlGuard, Marked
from raystill.datasets.prompts.read import SYSTEM_ROLES, RawPrompt
from raystill.datasets.prompts.template import (
    LONGEST_FRAME,
    REFUSALS,
    RENDER_S,
    template_environment,
)
from raystill.datasets.spool.progress import Meter, Progress
from raystill.model.files import HALF, half_in
from raystill.model.tokenizer import (
    SPECIAL_TOKENS,
    PlainText,
    chat_template,
    control_tokens,
    read_settings,
    shared_tokenizer,
    token_text,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TOOLS = "\0tools"
"""Role of what stands after the messages of a chat with tools: no message's."""


class TemplateRefusal(ValueError):
    """The chat template refuses a prompt, e.g. for a role that it does not know."""


class PromptTokeniser:
    """Tokenises prompts with the tokenizer and the chat template of a model's folder.

    ``prints_today`` is set once the template has printed today's date, because no other is set.
    Raises ConfigError where the folder has no usable tokenizer, or no chat template though
    ``prompts.chat_template`` is true.
    """

    def __init__(
        self, model_folder: str | Path, prompts: PromptsConfig, progress: Progress | None = None
    ) -> None:
        self.folder = Path(model_folder)
        self.prompts = prompts
        self.progress = progress
        self.settings = read_settings(self.folder)
        self._shared = shared_tokenizer(self.folder, self.settings)
        self.tokenizer = self._shared.tokenizer
        self.prints_today = False
        day = prompts.template_date
        self._now = datetime.now() if day is None else datetime.fromisoformat(day)
        source = chat_template(self.folder, self.settings)
        self._control = control_tokens(self.tokenizer, self.settings, self.folder, source)
        self._guard = ControlGuard(self._shared, self._control, source)
        self._template = self._compile_template(source) if prompts.chat_template else None
        if self._template is None and prompts.system is not None:
            raise config_error(
                "prompts.system",
                f"is {prompts.system!r}, which needs a chat template, but prompts.chat_template is "
                "false; set it to true, or remove prompts.system",
            )

    @property
    def num_ids(self) -> int:
        """One more than the largest id that the tokenizer gives a text."""
        return self._shared.num_ids

    def encode(self, raw: RawPrompt) -> np.ndarray:
        """Token ids ``int32[P]`` of one prompt, up to where the teacher's answer begins."""
        return self.encode_many([raw])[0]

    def encode_many(self, raws: Sequence[RawPrompt]) -> list[np.ndarray]:
        """:meth:`encode` of many prompts. Raises ConfigError with those that cannot be rendered."""
        encoder = self.encoder(len(raws))
        encoded = encoder.encode(raws)
        encoder.finish()
        return encoded

    def encoder(self, total: int) -> "PromptEncoder":
        """Tokenises so many prompts, some at a time."""
        return PromptEncoder(self, total)

    def _rendered(self, raw: RawPrompt) -> tuple[str | None, Marked | None]:
        """The text of a prompt, and the same with marks if it may hold control tokens.

        A raw text, without a template, is taken to be a template's work: its control tokens are.
        The text is None where the template refuses it only for what a control token looks like.
        """
        if self._template is None:
            return self.render(raw), None
        messages = self._chat(raw)
        if not self._guard.possible(messages):
            return self._render(messages), None
        try:
            marked = self._guard.mark(messages, self._render)
        except ValueError as error:
            raise error if isinstance(error, TemplateRefusal) else TemplateRefusal(error) from None
        try:
            return self._render(messages), marked
        except TemplateRefusal:
            return None, marked

    def encode_responses(
        self, texts: Sequence[str], stop_token_ids: Sequence[int], meter: Meter | None = None
    ) -> list[np.ndarray]:
        """Token ids ``int32[T]`` of given responses, each with a stop token at its end.

        ``meter``: of the responses of which these are some; None: they are all.
        One is appended where the text ends with none: the tokenizer's own end token, if it is one
        of ``stop_token_ids``, since that ends a turn of chat; else the first of them. An empty text
        has no ids. A control token anywhere else in a text is text.
        """
        end = token_text(self.settings.get("eos_token"))
        own = None if end is None else self.tokenizer.token_to_id(end)
        stop = stop_token_ids[0] if own is None or own not in stop_token_ids else own
        added = self.tokenizer.get_added_tokens_decoder()
        ends = [(added[i], i) for i in stop_token_ids if i in added and i in self._control.always]
        bodies: list[str] = []
        stops: list[int | None] = []
        for text in texts:
            token, found = next((e for e in ends if text.endswith(e[0].content)), (None, None))
            body = text if token is None else text[: len(text) - len(token.content)]
            bodies.append(body.rstrip() if token is not None and token.lstrip else body)
            stops.append(found)
        meter = meter or Meter(self.progress, "tokenising responses", len(texts))
        encoded = self._encode(bodies, meter, special=False)
        responses = []
        for body, ids, ended in zip(bodies, encoded, stops, strict=True):
            said = self._guard.response(ids.tolist(), body)
            if ended is not None:
                said = [*said, ended]
            elif said and said[-1] not in stop_token_ids:
                said = [*said, stop]
            responses.append(np.array(said, dtype=np.int32))
        return responses

    def plain_text(self) -> PlainText:
        """Reads answers in words, which must not begin or end a turn of the chat."""
        return self._guard.plain(self._control.always)

    def _encode(self, texts: Sequence[str], meter: Meter, special: bool) -> list[np.ndarray]:
        ids: list[np.ndarray] = []
        for batch in meter.batches(texts):
            encoded = self.tokenizer.encode_batch_fast(batch, add_special_tokens=special)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
        # The library has used threads now, and would print a warning at every later fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return ids

    def render(self, raw: RawPrompt) -> str:
        """The text to tokenise: the prompt in its chat template. Raises TemplateRefusal."""
        if self._template is None:
            if raw.text is None:
                raise TemplateRefusal(
                    "has chat messages, but prompts.chat_template is false; set it to true"
                )
            return raw.text
        return self._render(self._chat(raw))

    def _chat(self, raw: RawPrompt) -> list[dict[str, Any]]:
        """The messages, and after them the tools, which are text of the row's like these."""
        messages = self.messages(raw)
        if raw.tools is None:
            return messages
        if not re.search(r"\btools\b", self._template_text):
            raise TemplateRefusal(
                "has tools, of which the teacher's chat template says nothing; remove them, or "
                "name a teacher whose template does"
            )
        return [*messages, {"role": TOOLS, "tools": raw.tools}]

    def _render(self, chat: list[dict[str, Any]]) -> str:
        """The chat template's text for these messages. Raises TemplateRefusal."""
        assert self._template is not None, "without a template there are no messages"
        messages, offered = chat, {}
        if chat[-1]["role"] == TOOLS:
            messages, offered = chat[:-1], {"tools": chat[-1]["tools"]}
        self._require_roles(messages)
        variables = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self.prompts.chat_template_kwargs,
            **offered,
        }
        try:
            with within(RENDER_S):
                text = self._template.render(messages=messages, **variables)
        except TookTooLong as error:
            raise TemplateRefusal(f"the teacher's chat template {error} for it") from error
        except REFUSALS as error:
            reason = mask(str(error)[:2000])  # A template may quote the messages.
            raise TemplateRefusal(f"the teacher's chat template refuses it: {reason}") from None
        if len(text) > LONGEST_FRAME and len(text) > LONGEST_FRAME + 10 * len(str(chat)):
            raise TemplateRefusal(f"the teacher's chat template makes {len(text):,} characters")
        if HALF.search(text):  # By an escape in the template, since no file and no prompt has one.
            raise TemplateRefusal(f"the teacher's chat template writes {half_in(text)}; repair it")
        return text

    def _require_roles(self, messages: list[dict[str, Any]]) -> None:
        """Raise TemplateRefusal for a role that is neither usual nor named by the template.

        Many templates write whatever role there is, which the teacher has never seen.
        """
        for message in messages:
            role = message["role"]
            named = any(f"{q}{role}{q}" in self._template_text for q in "'\"")
            if role in ROLES or (named and role.replace("-", "_").isidentifier()):
                continue
            raise TemplateRefusal(
                f"has a message of the role {mask(shown_value(role, 60))}; expected one of "
                f"{', '.join(ROLES)}; correct it"
            )

    def messages(self, raw: RawPrompt) -> list[dict[str, Any]]:
        """The prompt as a chat, with ``prompts.system`` where it has no system message."""
        messages = raw.messages or [{"role": "user", "content": raw.text}]
        system = self.prompts.system
        if system is not None and messages[0].get("role") not in SYSTEM_ROLES:
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by the names that chat templates use (``bos_token``)."""
        names = [f"{one}_token" for one in SPECIAL_TOKENS]
        texts = {name: token_text(self.settings.get(name)) for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    def notices(self) -> list[str]:
        """Warnings about the prompts that were rendered."""
        if not self.prints_today:
            return self._guard.notices()
        return [
            *self._guard.notices(),
            "the teacher's chat template prints today's date, so the prompts change at midnight: "
            "the run cannot be resumed then, and stored answers are not found; set "
            f"prompts.template_date: {self._now:%Y-%m-%d}",
        ]

    def _strftime_now(self, form: str) -> str:
        """The date for a template; the same for all prompts, even if midnight passes meanwhile."""
        self.prints_today = self.prompts.template_date is None
        return self._now.strftime(form)

    def _compile_template(self, source: str | None) -> jinja2.Template:
        if source is None:
            raise config_error(
                "prompts.chat_template",
                f"is true, but {self.folder} has no chat template; set prompts.chat_template: "
                "false to ask the raw text",
            )
        self._template_text = source
        try:
            return template_environment(self._strftime_now).from_string(source)
        except (*REFUSALS, SyntaxError) as error:
            raise config_error(
                str(self.folder),
                f"its chat template is broken ({error}); repair it, or set "
                "prompts.chat_template: false",
            ) from None


class PromptEncoder:
    """Tokenises many prompts, some at a time, and keeps what is wrong with any of them."""

    def __init__(self, tokeniser: PromptTokeniser, total: int) -> None:
        self._tokeniser = tokeniser
        self._total = total
        self._rendering = Meter(tokeniser.progress, "rendering prompts", total)
        self._tokenising: Meter | None = None
        self._refused: list[Problem] = []
        self._unsettled: list[Problem] = []

    def encode(self, raws: Sequence[RawPrompt]) -> list[np.ndarray]:
        """Token ids ``int32[P]`` of each; of none once a prompt could not be rendered."""
        made = self._tokeniser
        texts: list[str | None] = []
        marked: dict[int, Marked] = {}
        for batch in self._rendering.batches(raws):
            for raw in batch:
                try:
                    text, with_marks = made._rendered(raw)
                except TemplateRefusal as error:
                    self._refused.append(Problem(raw.where, str(error)))
                    if isinstance(error.__cause__, TookTooLong):
                        self.finish()  # Each of the others would take as long.
                    continue
                if with_marks is not None:
                    marked[len(texts)] = with_marks
                texts.append(text)
        if self._refused:
            return []
        # A chat template writes the special tokens itself.
        self._tokenising = self._tokenising or Meter(
            made.progress, "tokenising prompts", self._total
        )
        plain = [text or "" for text in texts]
        encoded = made._encode(plain, self._tokenising, special=made._template is None)
        for number, of_one in marked.items():
            try:
                ids = None if texts[number] is None else encoded[number].tolist()
                settled = made._guard.settle(texts[number], ids, of_one)
                encoded[number] = np.array(settled, dtype=np.int32)
            except ValueError as error:
                self._unsettled.append(Problem(raws[number].where, str(error)))
        return encoded

    def finish(self) -> None:
        """Raise ConfigError with the prompts that could not be rendered; else, with those whose
        control tokens could not be told from text.
        """
        if problems := self._refused or self._unsettled:
            more = [Problem("prompts", f"{len(problems) - 5} more")] if len(problems) > 5 else []
            raise ConfigError(problems[:5] + more)
