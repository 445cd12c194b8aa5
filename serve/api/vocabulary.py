"""Which token id a service means by the text or the bytes of a token.

A service names tokens as text and, where it can, as bytes. Those are an id of the student's only
where one id alone stands for these bytes. *Unblocks* `told`, which reads a service's logprobs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from raystill.datasets.rows.token_bytes import token_bytes

REPLACEMENT = "\ufffd".encode()
"""What a service writes where a token is a part of a character, and so no text."""


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
