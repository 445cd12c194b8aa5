"""Weights of sources: how many samples of each training prompt an epoch asks for.

Plain arithmetic between the split of the prompts and their table. A source of weight w has
round(w x ``samples_per_prompt`` x its prompts) rows an epoch: whole passes over its prompts, one
for each sample number from 0, and for the rest one further sample of some of them. Which these are
follows from the root seed, the source's name and the prompt alone, so a larger weight asks for
everything a smaller one does, and a further prompt hardly changes the choice.

Legend: P training prompts, N training rows.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from raystill.cluster.problems import ConfigError, Problem
from raystill.datasets.config import PromptsConfig


def samples_asked(
    prompts: PromptsConfig, seed: int, ids: Sequence[np.ndarray], sources: Sequence[str]
) -> NDArray[np.int64]:
    """Samples to ask of each training prompt, int64 [P]; ``ids`` and ``sources`` are theirs.

    Raises ConfigError where a source has prompts and its weight makes no row of them.
    """
    samples = np.full(len(ids), prompts.samples_per_prompt, dtype=np.int64)
    names = np.array(sources, dtype=object)
    problems = []
    for number, source in enumerate(prompts.sources or ()):
        mine = np.flatnonzero(names == source.name)
        if not len(mine):
            continue
        each = source.weight * prompts.samples_per_prompt
        num_rows = math.floor(each * len(mine) + 0.5)
        if num_rows == 0:
            problems.append(
                Problem(
                    f"prompts.sources.{number}.weight",
                    f"is {source.weight:g}, which makes no row of the {len(mine)} training prompts "
                    f"of {source.name!r}; raise it, or remove the source",
                )
            )
        samples[mine], rest = divmod(num_rows, len(mine))
        if rest:
            ranks = [_rank(seed, source.name, ids[index]) for index in mine]
            first = sorted(range(len(mine)), key=ranks.__getitem__)[:rest]
            samples[mine[first]] += 1
    if problems:
        raise ConfigError(problems)
    return samples


def list_rows(samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompt and the sample number of each row, int64 [N]: all first samples, all second..."""
    passes = [np.flatnonzero(samples > number) for number in range(samples.max(initial=0))]
    numbers = [np.full(len(rows), number) for number, rows in enumerate(passes)]
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *passes]), np.concatenate([none, *numbers])


def _rank(seed: int, name: str, prompt: np.ndarray) -> bytes:
    """Where a prompt stands among those of its source: the lowest are chosen first."""
    digest = blake2b(f"{seed} {name}".encode() + b"\0", digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    return digest.digest()
