"""Loads a tokenizer and its chat template without ``transformers``, and so without torch.

``check`` should end within five seconds, and runs on machines without torch. So this module reads
``tokenizer.json`` and the chat template itself. Tests compare it with ``AutoTokenizer``.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raystill.base.errors import config_error
from raystill.model.files import read_object

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json``. Raises ConfigError if it is broken.

    Older folders keep their special tokens in ``special_tokens_map.json``, which is read then too.
    """
    settings = read_object(folder / "tokenizer_config.json", strict=True)
    if "added_tokens_decoder" not in settings:
        settings |= read_object(folder / "special_tokens_map.json", strict=True)
    return settings


class SharedTokenizer:
    """A tokenizer that several readers of this process use; none of them may change it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id that the tokenizer gives a text."""
        return max(self.vocabulary.values(), default=-1) + 1


_shared: dict[tuple[str, str], SharedTokenizer] = {}
MOST_SHARED = 2
"""Tokenizers kept: the teacher's and the student's."""


def shared_tokenizer(folder: Path, settings: dict[str, Any]) -> SharedTokenizer:
    """:func:`load_tokenizer`, where files and settings of the same content are read once.

    Reading one of 49,152 ids takes a quarter of a second, and the student's is mostly a copy of the
    teacher's.
    """
    path = folder / "tokenizer.json"
    content = path.read_bytes() if path.is_file() else b""  # load_tokenizer says what is wrong.
    key = (hashlib.sha256(content).hexdigest(), json.dumps(settings, sort_keys=True, default=repr))
    if key not in _shared:
        found = SharedTokenizer(load_tokenizer(folder, settings))
        while len(_shared) >= MOST_SHARED:
            del _shared[next(iter(_shared))]
        _shared[key] = found
    return _shared[key]


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """Load ``tokenizer.json``, and add the tokens that only ``tokenizer_config.json`` names.

    ``add_bos_token`` is ignored: the post-processor in ``tokenizer.json`` decides, as in
    ``transformers`` 5. Raises ConfigError if there is no tokenizer or it is broken.
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
    except Exception as error:  # The tokenizers library raises plain Exception.
        raise config_error(str(path), f"is not a tokenizer ({error}); save it again") from None
    # tokenizer.json may have been saved with the truncation and padding of a training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        _add_tokens(tokenizer, settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise config_error(
            str(folder / "tokenizer_config.json"),
            f"names its tokens in a form that is none of transformers' ({error}); save it again",
        ) from None
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Add tokens that only ``tokenizer_config.json`` names, in the order of ``transformers``.

    The order decides their ids.
    """
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
        fields = {} if isinstance(token, str) else dict(token)
        flags = {name: fields[name] for name in TOKEN_FLAGS if name in fields}
        tokenizer.add_tokens([AddedToken(text, special=fields.get("special", True), **flags)])


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the folder's chat template; None if it has none.

    Looked for as ``transformers`` does: ``chat_template.jinja``, ``tokenizer_config.json``, then
    ``chat_template.json``. Of several named templates the one called ``default`` is taken.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if template is None:
        template = read_object(folder / "chat_template.json", strict=True).get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        kind = type(template).__name__
        raise config_error(str(folder), f"has a chat template that is a {kind}, expected a text")
    return template


def token_text(token: Any) -> str | None:
    """Return a token's text; in the files a token is text, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token
