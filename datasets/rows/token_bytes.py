"""The bytes that each token id of a tokenizer stands for, in whose order they are a text.

Imports neither Ray nor torch.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

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
