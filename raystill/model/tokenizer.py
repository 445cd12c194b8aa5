"""Prompts to token ids, as ``transformers`` would make them, without importing it (or torch).

``check`` has five seconds and runs on machines without torch, so this reads ``tokenizer.json``
and the chat template itself. Tests hold it equal to ``AutoTokenizer``.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raystill.base.errors import config_error

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def read_settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, with the special tokens that older folders keep apart."""
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
    return settings


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """``tokenizer.json`` and the tokens ``tokenizer_config.json`` adds. Raises ConfigError.

    ``add_bos_token`` has no say beside a ``tokenizer.json``: its post-processor has (as in
    ``transformers`` 5).
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise config_error(
            str(folder),
            "has no tokenizer.json; save the tokenizer with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise config_error(str(path), f"is not a tokenizer ({error}); save it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, settings)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Tokens that only ``tokenizer_config.json`` names, in the order ``transformers`` adds them."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder", {})
    wanted: list[Any] = [decoder[index] for index in sorted(decoder, key=int)]
    wanted += [settings.get(f"{name}_token") for name in SPECIAL_TOKENS]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    wanted += list(extra.values()) if isinstance(extra, dict) else list(extra)
    for token in wanted:
        text = token_text(token)
        if text is None or text in known:
            continue
        known.add(text)
        marks = {} if isinstance(token, str) else dict(token)
        flags = {name: marks[name] for name in TOKEN_FLAGS if name in marks}
        tokenizer.add_tokens([AddedToken(text, special=marks.get("special", True), **flags)])


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The folder's chat template, from wherever it is kept."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template


def token_text(token: Any) -> str | None:
    """A token's text, from either spelling: plain, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises ConfigError where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise config_error(str(path), f"cannot be read as JSON ({error}); mend it") from None
    if not isinstance(value, dict):
        raise config_error(str(path), f"is a {type(value).__name__}; expected an object")
    return value
