"""Loads a tokenizer and its chat template without ``transformers``, and so without torch.

``check`` should end within five seconds, and runs on machines without torch. So this module reads
``tokenizer.json`` and the chat template itself. Tests compare it with ``AutoTokenizer``.

It also says which tokens are control tokens (:func:`control_tokens`), and reads text in which none
of them can be written (:class:`PlainText`).
"""

import base64
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raystill.base.errors import config_error
from raystill.base.records import mapping, read_bounded
from raystill.base.user_function import tried
from raystill.model.files import LARGEST_FILE, read_object

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
PIPED = re.compile(r"[<\[][|\uff5c].+[|\uff5c][>\]]", re.DOTALL)
"""The form in which most models write what begins and ends a turn, with either bar."""
ENDS = ("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>")
"""What begins, ends or fills a text in vocabularies of SentencePiece, marked as special or not."""
TAG = re.compile(r"</?([A-Za-z][\w:.-]*)>")
PRIVATE = (0xF0000, 0x100000)
"""Where the two planes begin whose characters Unicode leaves to private agreement."""
PLANE = 0xFFFE
NAME_CHARACTERS = 8
LONGEST_TOKEN, MOST_ADDED = 1_000, 1_500_000
"""Characters of an added token, of which known ones have a hundred, and of all of them, of which
models of images have 750,000. How a template can make one is tried at each character."""
TRIAL = "".join(map(chr, range(32, 127))) + "é中😀\n"
TRIAL_S, TRIAL_BYTES, MOST_TIMES = 2, 1 << 30, 100
"""Processor time and memory in which a tokenizer reads it, and how much longer it may make it."""
NO_PANICS = (KeyboardInterrupt, SystemExit, MemoryError)
"""What is no fault of a tokenizer. A panic of a library in Rust is no Exception of Python's."""
LARGEST_TEMPLATE = 1 << 20
"""Bytes of a chat template; the longest known has 20 KB."""


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
        self._plain: dict[frozenset[int], PlainText] = {}

    def plain_text(self, control: frozenset[int]) -> "PlainText":
        """The tokenizer for which these control tokens are text, which is made once.

        That takes twice as long as reading the tokenizer.
        """
        if control not in self._plain:
            self._plain[control] = PlainText(self.tokenizer, control)
        return self._plain[control]

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
    try:
        content = read_bounded(path, LARGEST_FILE)
    except OSError:
        content = b""  # load_tokenizer says what is wrong.
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
        _require_tables(read_bounded(path, LARGEST_FILE))
        with _told_after():
            tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # The library raises plain Exception, and panics as Rust does.
        if isinstance(error, NO_PANICS):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise config_error(str(path), f"is not a tokenizer ({reason}); save it again") from None
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
    lengths = [len(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
    if max(lengths, default=0) > LONGEST_TOKEN or sum(lengths) > MOST_ADDED:
        raise config_error(
            str(folder),
            f"adds tokens of up to {max(lengths):,} and together {sum(lengths):,} characters, "
            f"expected {LONGEST_TOKEN:,} and {MOST_ADDED:,} at most; save its tokenizer again",
        )
    return tokenizer


def _require_tables(content: bytes) -> None:
    """ValueError for a table of a normaliser that is shorter than it says.

    The library takes as much memory as its first four bytes say, up to 8 GB, and ends the process
    where there is less.
    """
    if b"recompiled" not in content and b"\\u" not in content:  # No other spelling is there.
        return
    waiting = [mapping(json.loads(content)).get("normalizer")]
    while waiting:
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        text = one.get("precompiled_charsmap") if isinstance(one, dict) else None
        table = base64.b64decode(text) if isinstance(text, str) else b""
        size = int.from_bytes(table[:4], "little")
        if size > len(table):
            raise ValueError(
                f"a table of its normaliser says {size:,} bytes and has {len(table):,}"
            )


@contextmanager
def _told_after() -> Iterator[None]:
    """What is written to the standard error meanwhile comes after; nothing where all ends in error.

    A panic of Rust writes a stack there, before it is an error that a person is told in a sentence.
    """
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
        kept.seek(0)
        if told := kept.read():
            os.write(2, told)


def check_tokenizer(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError for a tokenizer with which no prompt can be read, or none twice alike.

    A replacement of its normaliser may make a text a thousand times longer, and the next one that.
    """
    shared = shared_tokenizer(folder, settings)
    tokenizer = shared.tokenizer

    def read() -> None:
        normaliser = tokenizer.normalizer
        if normaliser and len(normaliser.normalize_str(TRIAL)) > MOST_TIMES * len(TRIAL):
            raise MemoryError
        tokenizer.encode(TRIAL)

    ids: list[int] = []
    reason = tried(read, TRIAL_S, TRIAL_BYTES)
    try:
        ids = [] if reason else tokenizer.encode(TRIAL).ids
    except BaseException as error:
        if isinstance(error, NO_PANICS):
            raise
        reason = f"cannot read ({str(error).partition(chr(10))[0][:300]})"
    if reason:
        reason += f" for a text of {len(TRIAL)} characters"
    elif getattr(tokenizer.model, "dropout", None):
        reason = "has a dropout, with which a text is read in another way each time"
    elif max(ids, default=0) >= shared.num_ids:
        reason = f"adds ids to a text that are none of its {shared.num_ids} tokens"
    if reason:
        message = f"{reason}; save the tokenizer again"
        raise config_error(str(folder / "tokenizer.json"), message)


def _add_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Add tokens that only ``tokenizer_config.json`` names, in the order of ``transformers``.

    The order decides their ids.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder", {})
    wanted: list[Any] = [decoder[index] for index in sorted(decoder, key=int)]
    wanted += [settings.get(f"{name}_token") for name in SPECIAL_TOKENS]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, dict | list):
        raise TypeError(f"special tokens that are a {type(extra).__name__}, expected a list")
    wanted += list(extra.values()) if isinstance(extra, dict) else extra
    adding = []
    for token in wanted:
        text = token_text(token)
        if text is None or text in known:
            continue
        known.add(text)
        fields = {} if isinstance(token, str) else dict(token)
        flags = {name: fields[name] for name in TOKEN_FLAGS if name in fields}
        adding.append(AddedToken(text, special=fields.get("special", True), **flags))
    tokenizer.add_tokens(adding)  # All at once: each call reads all tokens anew.


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the folder's chat template; None if it has none.

    Looked for as ``transformers`` does: ``chat_template.jinja``, ``tokenizer_config.json``, then
    ``chat_template.json``. Of several named templates the one called ``default`` is taken.
    """
    path = folder / "chat_template.jinja"
    if path.exists() and not path.is_dir():
        try:
            return read_bounded(path, LARGEST_TEMPLATE).decode("utf-8")
        except (OSError, ValueError) as error:
            raise config_error(str(path), f"cannot be read ({error}); save it again") from None
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
    if template is not None and len(template) > LARGEST_TEMPLATE:
        message = f"has a chat template of {len(template):,} characters, expected at most "
        raise config_error(str(folder), f"{message}{LARGEST_TEMPLATE:,}; save it again")
    return template


def token_text(token: Any) -> str | None:
    """Return a token's text; in the files a token is text, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


@dataclass(frozen=True)
class ControlTokens:
    """Token ids with a meaning that only a chat template, or the model itself, may give a text.

    always: those that frame turns. tags: pairs like ``<think>`` and ``</think>`` that are not
    marked as special and that the template writes: whoever asks may not write them, but they are
    words of an answer.
    """

    always: frozenset[int]
    tags: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """Both kinds."""
        return self.always | self.tags


def control_tokens(
    tokenizer: Tokenizer, settings: Mapping[str, Any], folder: Path, template: str | None
) -> ControlTokens:
    """The control tokens of a model's folder.

    Beside those marked as special: an added token that ``tokenizer_config.json`` names by its role
    or ``generation_config.json`` as an end, one of the form ``<|...|>``, and one in brackets that
    the chat template writes. DeepSeek-V3's ``<|User|>`` and Command R's start of a turn, for
    example, are not marked. Runs of spaces, which some vocabularies add, are none.
    """
    added = tokenizer.get_added_tokens_decoder()
    named = {token_text(settings.get(f"{name}_token")) for name in SPECIAL_TOKENS}
    ends = read_object(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    names = Counter(found[1] for t in added.values() if (found := TAG.fullmatch(t.content)))
    always: set[int] = set()
    tags: set[int] = set()
    for index, token in added.items():
        text = token.content
        if not text.strip():
            continue
        if token.special or text in ENDS or text in named or index in ends or PIPED.fullmatch(text):
            always.add(index)
        elif _in_brackets(text) and template is not None and text in template:
            tag = TAG.fullmatch(text)
            (tags if tag is not None and names[tag[1]] > 1 else always).add(index)
    return ControlTokens(frozenset(always), frozenset(tags))


def _in_brackets(text: str) -> bool:
    """Whether a text of three characters or more has no letter or digit at its ends."""
    return len(text) > 2 and not any(c.isalnum() or c.isspace() for c in (text[0], text[-1]))


class PlainText:
    """Reads text in which no control token can be written, however it is spelt.

    It is the tokenizer with its control tokens under secret names of private characters, in the
    list of added tokens and in the vocabulary: so neither their text, nor one that the normaliser
    makes of it, nor the merges of the vocabulary lead to their ids. All other text has the ids it
    always has. ``encode_special_tokens`` of the library leaves out tokens that are not marked as
    special, and those that the vocabulary has as pieces.
    """

    def __init__(self, tokenizer: Tokenizer, control: Iterable[int]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.names = {index: _secret_name() for index in control}
        contents = {added[index].content: name for index, name in self.names.items()}
        described = json.loads(tokenizer.to_str())
        described |= {"post_processor": None, "truncation": None, "padding": None}
        normalise = tokenizer.normalizer
        for token in described["added_tokens"]:
            if token["id"] in self.names:
                token["content"] = name = self.names[token["id"]]
                kept = normalise is None or name in normalise.normalize_str(name)
                token["normalized"] = token["normalized"] and kept
        _rename(described["model"], contents)
        self._tokenizer = Tokenizer.from_str(json.dumps(described))
        wrong = [i for i, name in self.names.items() if self._tokenizer.token_to_id(name) != i]
        assert not wrong, f"token ids {wrong[:5]} are others under another name"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. A control token is read only by its name in :attr:`names`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _secret_name() -> str:
    """A text that nobody guesses, of characters that no vocabulary has."""
    return "".join(
        chr(secrets.choice(PRIVATE) + secrets.randbelow(PLANE)) for _ in range(NAME_CHARACTERS)
    )


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a vocabulary, and drop the merges that lead to them or begin with them."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if (unknown := model.get("unk_token")) is not None:
        model["unk_token"] = names.get(unknown, unknown)
    if merges := model.get("merges"):
        parts = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
        model["merges"] = [
            [left, right]
            for left, right in parts
            if left not in names and right not in names and left + right not in names
        ]
