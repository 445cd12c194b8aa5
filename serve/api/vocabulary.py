"""Which token id a service means by the text or the bytes of a token.

A service names tokens as text and, where it can, as bytes. Those are an id of the student's only
where one id alone stands for these bytes. *Unblocks* `told`, which reads a service's logprobs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

REPLACEMENT = "\ufffd".encode()
"""What a service writes where a token is a part of a character, and so no text."""
SPACE = "\u2581"
"""The space of SentencePiece's vocabularies."""


class NoBytes(Exception):
    """A tokenizer whose tokens do not stand for bytes each, so that their order gives the text."""


def byte_of_character() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies (GPT-2's table).

    Printable characters of Latin-1 are themselves, the other 68 bytes are those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """What each id stands for; an id without bytes of its own is left out. Raises NoBytes."""
    parts = _decoder_parts(tokenizer)
    kinds = {part.get("type") for part in parts}
    added = tokenizer.get_added_tokens_decoder()
    own = {index: token.content.encode() for index, token in added.items()}
    pieces = {i: piece for piece, i in tokenizer.get_vocab(with_added_tokens=False).items()}
    if "ByteLevel" in kinds:
        table = byte_of_character()
        read = {
            i: bytes(map(table.__getitem__, piece))
            for i, piece in pieces.items()
            if piece and all(character in table for character in piece)
        }
    elif "Metaspace" in kinds or any(_replaces_space(part) for part in parts):
        fallback = "ByteFallback" in kinds
        read = {i: _of_piece(piece, fallback) for i, piece in pieces.items() if piece}
    else:
        raise NoBytes(", ".join(sorted(map(str, kinds))) or "no decoder")
    return read | own


def _decoder_parts(tokenizer: Tokenizer) -> list[Mapping[str, Any]]:
    decoder = tokenizer.decoder
    if decoder is None:
        return []
    described: Mapping[str, Any] = json.loads(decoder.__getstate__())
    return list(described.get("decoders", [described]))


def _replaces_space(part: Mapping[str, Any]) -> bool:
    pattern = part.get("pattern") or {}
    return part.get("type") == "Replace" and pattern.get("String") == SPACE


def _of_piece(piece: str, fallback: bool) -> bytes:
    if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


class Vocabulary:
    """Token ids by their bytes, each where no other id has the same.

    control: ids that only a chat template or the model may write, never a text.
    """

    def __init__(self, tokenizer: Tokenizer, control: Iterable[int]) -> None:
        """Raises NoBytes."""
        self.control = frozenset(control)
        self._bytes = token_bytes(tokenizer)
        times = Counter(self._bytes.values())
        self._ids = {
            meant: index
            for index, meant in self._bytes.items()
            if meant and times[meant] == 1 and REPLACEMENT not in meant
        }
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)

    def id_of(self, meant: bytes) -> int | None:
        """The one id that stands for these bytes; None where there is none, or are several."""
        return self._ids.get(meant)

    def ids_of(self, meant: Sequence[bytes]) -> NDArray[np.int64]:
        """As `id_of`, of many; -1 where it has none."""
        return np.fromiter(map(self._ids.get, meant, repeat(-1)), np.int64, len(meant))

    def bytes_of(self, index: int) -> bytes:
        """What an id stands for; nothing where it has no bytes."""
        return self._bytes.get(index, b"")

    def fillers(self, count: int) -> list[int]:
        """Ids for places that a service named too few tokens for: those least likely to be meant.

        Control tokens first, then the last ids.
        """
        rest = (i for i in range(self.size - 1, -1, -1) if i not in self.control)
        found = sorted(self.control, reverse=True)[:count]
        return [*found, *(i for i, _ in zip(rest, range(count - len(found)), strict=False))]
