"""The chat template of a model: its environment, as chat templates expect it, and its trial."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from raystill.base.errors import config_error
from raystill.base.user_function import tried
from raystill.config.prompts import PromptsConfig
from raystill.model.tokenizer import chat_template, check_tokenizer, read_settings

RENDER_S, RENDER_BYTES = 2, 256 << 20
"""Processor time and memory in which a chat template renders a prompt."""
LONGEST_FRAME = 1_000_000
"""Characters that a chat template may write beside ten times its messages'."""
REFUSALS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)


def check_template(folder: Path, prompts: PromptsConfig) -> None:
    """Raise ConfigError for a tokenizer or a chat template that needs time or memory without end.

    Tried on a short prompt, before anything else is done with it.
    """
    check_tokenizer(folder, settings := read_settings(folder))
    source = chat_template(folder, settings) if prompts.chat_template else None
    reason = "" if source is None else _why_endless(source)
    if reason:
        raise config_error(
            str(folder),
            f"its chat template {reason} for a prompt of few words; repair it, or set "
            "prompts.chat_template: false",
        )


@lru_cache(maxsize=64)
def _why_endless(source: str) -> str:
    messages = [{"role": "user", "content": "2 + 2?"}]
    asked = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}

    def render() -> None:
        template = template_environment(lambda form: form).from_string(source)
        if len(template.render(asked)) > 2 * LONGEST_FRAME:
            raise MemoryError

    return tried(render, RENDER_S, RENDER_BYTES)


def template_environment(strftime_now: Callable[[str], str]) -> jinja2.Environment:
    """The jinja2 environment that chat templates expect, with ``strftime_now`` for the date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants a plain set)

    def parse(self, parser: Any) -> Any:
        """A node that renders what is between the tags, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body)
        return block.set_lineno(line)

    def _between(self, caller: Any) -> Any:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
