# SPDX-License-Identifier: Apache-2.0
"""Write ``quickstart.jsonl``, the quickstart's prompts, from the family files.

Each file ``families/NAME.txt`` is one family. A line that starts with ``#`` is a comment, a
line that starts with ``= `` is a phrasing with slots ``{0}``, ``{1}``, and every other line is
one item, its slot values separated by `` | ``. Item ``i`` takes phrasing ``i`` modulo the number
of phrasings; a family without phrasings lists its prompts whole. The families are dealt out in
turn, so that the first lines of the output cover all of them. Nothing here is random.

    python examples/prompts/make_prompts.py
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAMILIES_DIR = HERE / "families"
OUTPUT = HERE / "quickstart.jsonl"
HELD_OUT_FAMILIES: tuple[str, ...] = ("advice", "comparisons", "definitions", "travel_plans")
NGRAM_WORDS = 8


def parse_family(text: str) -> list[str]:
    """Return the prompts that one family file describes, in order."""
    phrasings: list[str] = []
    items: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("= "):
            phrasings.append(line[2:].replace("\\n", "\n"))
        else:
            items.append(line)
    if not phrasings:
        return items
    return [
        _start_upper(phrasings[i % len(phrasings)].format(*item.split(" | ")))
        for i, item in enumerate(items)
    ]


def _start_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def load_families(folder: Path = FAMILIES_DIR) -> dict[str, list[str]]:
    """Return every family's prompts, by family name in alphabetical order."""
    paths = sorted(folder.glob("*.txt"), key=lambda path: path.stem)
    return {path.stem: parse_family(path.read_text(encoding="utf-8")) for path in paths}


def interleave(families: dict[str, list[str]]) -> list[dict[str, str]]:
    """Deal the families out in turn, one prompt of each at a time."""
    longest = max((len(prompts) for prompts in families.values()), default=0)
    return [
        {"source": name, "prompt": prompts[i]}
        for i in range(longest)
        for name, prompts in families.items()
        if i < len(prompts)
    ]


def word_ngrams(text: str, n: int = NGRAM_WORDS) -> set[tuple[str, ...]]:
    """Return the word n-grams of ``text``: lowercase, split on non-alphanumerics."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shared_ngrams(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """Return the n-grams that both a held-out and a training prompt contain."""
    held_out: set[tuple[str, ...]] = set()
    training: set[tuple[str, ...]] = set()
    for row in rows:
        side = held_out if row["source"] in HELD_OUT_FAMILIES else training
        side.update(word_ngrams(row["prompt"]))
    return held_out & training


def render(rows: list[dict[str, str]]) -> str:
    """Return the rows as JSON Lines text."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Write the prompts; refuse if a held-out prompt overlaps a training prompt."""
    parser = argparse.ArgumentParser(description="Write the quickstart's prompts.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON Lines file to write")
    args = parser.parse_args(argv)
    families = load_families()
    missing = [name for name in HELD_OUT_FAMILIES if name not in families]
    if missing:
        parser.error(f"held-out families without a file: {', '.join(missing)}")
    rows = interleave(families)
    overlap = shared_ngrams(rows)
    if overlap:
        example = " ".join(min(overlap))
        parser.error(f"{len(overlap)} {NGRAM_WORDS}-grams cross the split, such as: {example}")
    args.output.write_text(render(rows), encoding="utf-8", newline="\n")
    print(f"wrote {len(rows)} prompts of {len(families)} families to {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
