"""The texts by which a student's start is chosen and fitted: prompts with the teacher's answers.

They are one batch. Padded, each text is a row. Packed, several are in a row, none sees another, and
what all texts begin with (the chat template's system prompt) is computed once a row: a third to a
half of the tokens. A model is given packed texts only after `packed_for` has seen that it computes
the same of them.

Legend: B texts, R rows, S tokens of the longest row, P tokens of a prompt, T of an answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ROW_TOKENS = 320
"""Tokens of a packed row, if no text is longer: attention costs a tenth of a layer then."""
LEAST_SHARED = 8
"""A shorter beginning is computed with each text."""
COMPARED = 2
"""Texts on which packed and padded are compared, and how far they may differ, as a share of the
largest component: rounding. In 16 bits also by an expert that is chosen differently."""
MOST_SHIFT = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}
SHARED, NOTHING = -1, -2
"""In place of a text's number: a token of the beginning that all share, and no token."""
Part: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A prompt [P] and its answer [T]."""


@dataclass(frozen=True)
class Texts:
    """What is judged.

    Attributes:
        input_ids: int64 [R, S].
        text: int64 [R, S], the number of each token's text, ``SHARED`` or ``NOTHING``.
        positions: int64 [R, S], of each token in its text.
        judged: bool [R, S], the positions whose next token counts for a KL.
        count: float32 [R, S], how many tokens of the texts each stands for; 0 for none.
        parts: prompt [P] and answer [T] of each text.
    """

    input_ids: Tensor
    text: Tensor
    positions: Tensor
    judged: Tensor
    count: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> "Texts":
        """One text a row, padded on the right; what counts is the answers' tokens."""
        parts = tuple(zip(prompts, answers, strict=True))
        return cls.laid_out(parts, [[i] for i in range(len(parts))], 0)

    @classmethod
    def packed(cls, parts: Sequence[Part]) -> "Texts":
        """Several texts a row, after the beginning that all their prompts share."""
        shared = shared_beginning([prompt for prompt, _ in parts])
        shared = shared if shared >= LEAST_SHARED else 0
        rests = [len(prompt) + len(answer) - shared for prompt, answer in parts]
        room = max(ROW_TOKENS - shared, *rests)
        rows: list[list[int]] = []
        left: list[int] = []
        for i in sorted(range(len(parts)), key=lambda i: -rests[i]):
            place = next((row for row, free in enumerate(left) if free >= rests[i]), len(rows))
            if place == len(rows):
                rows.append([])
                left.append(room)
            rows[place].append(i)
            left[place] -= rests[i]
        return cls.laid_out(parts, rows, shared)

    @classmethod
    def laid_out(
        cls,
        parts: Sequence[Part],
        rows: Sequence[Sequence[int]],
        shared: int,
    ) -> "Texts":
        """These texts a row, after ``shared`` tokens that they begin with."""
        lengths = [[len(parts[i][0]) + len(parts[i][1]) - shared for i in row] for row in rows]
        size = (len(rows), max(shared + sum(row) for row in lengths))
        text, judged = torch.full(size, NOTHING), torch.zeros(size, dtype=torch.bool)
        input_ids, positions, count = torch.zeros(size), torch.zeros(size), torch.zeros(size)
        input_ids, positions = input_ids.long(), positions.long()
        for r, row in enumerate(rows):
            if shared:
                input_ids[r, :shared] = torch.from_numpy(parts[row[0]][0][:shared].astype(np.int64))
                positions[r, :shared] = torch.arange(shared)
                text[r, :shared], count[r, :shared] = SHARED, len(parts) / len(rows)
            start = shared
            for i, length in zip(row, lengths[r], strict=True):
                prompt, answer = parts[i]
                end, whole = start + length, np.concatenate([prompt, answer])[shared:]
                input_ids[r, start:end] = torch.from_numpy(whole.astype(np.int64))
                positions[r, start:end] = torch.arange(shared, shared + length)
                text[r, start:end], count[r, start:end] = i, 1.0
                first = start + len(prompt) - shared - 1
                judged[r, max(start, first) : end - 1] = True
                start = end
        return cls(input_ids, text, positions, judged, count, tuple(parts))

    @property
    def present(self) -> Tensor:
        """Where there is a token, bool [R, S]."""
        return self.text != NOTHING

    @property
    def one_a_row(self) -> bool:
        """Whether each row is a text of its own."""
        return len(self.text) == len(self.parts)

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """What the model, or its decoder, is called with."""
        if self.one_a_row:
            return {"input_ids": self.input_ids, "attention_mask": self.present.long()}
        dtype = next(model.parameters()).dtype
        before = torch.ones(self.text.shape[1], self.text.shape[1], dtype=torch.bool).tril()
        same = self.text[:, :, None] == self.text[:, None, :]
        seen = before.to(same.device) & (same | (self.text == SHARED)[:, None, :])
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return {
            "input_ids": self.input_ids,
            "attention_mask": mask,
            "position_ids": self.positions,
        }

    def first(self, count: int) -> "Texts":
        """The first so many of them, laid out in the same way."""
        parts = self.parts[:count]
        if self.one_a_row:
            texts = Texts.of([prompt for prompt, _ in parts], [answer for _, answer in parts])
        else:
            texts = Texts.packed(parts)
        return texts.to(self.text.device)

    def to(self, device: torch.device) -> "Texts":
        """The same on a device."""
        ids, text, positions, judged, count = (
            tensor.to(device)
            for tensor in (self.input_ids, self.text, self.positions, self.judged, self.count)
        )
        return Texts(ids, text, positions, judged, count, self.parts)


def shared_beginning(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all prompts begin with; the last token of a prompt is never one of them."""
    least = min(len(prompt) for prompt in prompts)
    heads = np.stack([prompt[:least] for prompt in prompts])
    differs = np.flatnonzero((heads != heads[0]).any(0))
    return int(min(differs[0] if len(differs) else least, max(0, least - 1)))


@torch.no_grad()
def packed_for(model: nn.Module, texts: Texts) -> Texts:
    """The texts packed, where ``model`` computes of them what it does of padded ones.

    A recurrent state, a mask of the model's own, or positions that it does not take make packed
    texts others; they stay padded then, which costs time alone.
    """
    if len(texts.parts) <= COMPARED or not texts.one_a_row:
        return texts
    device = texts.text.device
    longest = sorted(texts.parts, key=lambda part: -sum(map(len, part)))[:COMPARED]
    if (reason := _difference(model, longest, device)) is not None:
        logger.info("the texts stay padded: %s", reason)
        return texts
    return Texts.packed(texts.parts).to(device)


def _difference(model: nn.Module, parts: Sequence[Part], device: torch.device) -> str | None:
    """Why the model's hidden states of these texts in one row are not its own; None: they are."""
    padded = Texts.of([prompt for prompt, _ in parts], [answer for _, answer in parts]).to(device)
    shared = shared_beginning([prompt for prompt, _ in parts])
    packed = Texts.laid_out(parts, [range(len(parts))], shared).to(device)
    wanted = _hidden(model, padded)
    try:
        found = _hidden(model, packed)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{type(model).__name__} does not take them ({error})"
    most = MOST_SHIFT.get(wanted.dtype, 0.0) * float(wanted[padded.present].abs().max())
    for number in range(len(padded.parts)):
        mine = packed.text == number
        apart = found[mine] - wanted[number, packed.positions[mine]]
        if not float(apart.abs().max()) <= most:
            return f"{type(model).__name__} computes others of them"
    return None


def _hidden(model: Any, texts: Texts) -> Tensor:
    output = model.get_decoder()(**texts.inputs(model), use_cache=False)
    states: Tensor = output.last_hidden_state
    return states
