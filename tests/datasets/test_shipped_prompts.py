# SPDX-License-Identifier: Apache-2.0
"""The quickstart's prompts: enough of them, reproducible, and a clean held-out split."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

PROMPTS_DIR = Path(__file__).resolve().parents[2] / "examples" / "prompts"
SHIPPED = PROMPTS_DIR / "quickstart.jsonl"


def _load_generator() -> ModuleType:
    path = PROMPTS_DIR / "make_prompts.py"
    spec = importlib.util.spec_from_file_location("shipped_make_prompts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return _load_generator()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def _eight_grams(text: str) -> set[str]:
    words = _words(text)
    return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}


def test_rows_are_plain_source_and_prompt(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert set(row) == {"source", "prompt"}
        assert row["prompt"] == row["prompt"].strip()
        assert 5 <= len(row["prompt"].split()) <= 60, row
        assert not re.search(r"\{\d\}| \| ", row["prompt"]), row


def test_there_are_enough_prompts_and_families(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["source"] for row in rows)
    assert len(rows) >= 500
    assert len(counts) >= 20
    assert min(counts.values()) >= 20


def test_no_prompt_is_repeated(rows: list[dict[str, str]]) -> None:
    counts = Counter(" ".join(_words(row["prompt"])) for row in rows)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_the_generator_reproduces_the_file(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "again.jsonl"
    assert generator.main(["--output", str(output)]) == 0
    assert output.read_bytes() == SHIPPED.read_bytes()
    assert "wrote" in capsys.readouterr().out


def test_four_families_are_held_out(generator: ModuleType, rows: list[dict[str, str]]) -> None:
    held_out = generator.HELD_OUT_FAMILIES
    assert len(set(held_out)) == len(held_out) == 4
    assert set(held_out) <= {row["source"] for row in rows}


def test_no_held_out_prompt_shares_an_eight_gram_with_training(
    generator: ModuleType, rows: list[dict[str, str]]
) -> None:
    training: set[str] = set()
    for row in rows:
        if row["source"] not in generator.HELD_OUT_FAMILIES:
            training |= _eight_grams(row["prompt"])
    assert training
    for row in rows:
        if row["source"] in generator.HELD_OUT_FAMILIES:
            assert _eight_grams(row["prompt"]) & training == set(), row


def test_the_generator_refuses_an_eight_gram_that_crosses(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = "Tell me in plain words what a good day looks like"
    families = {name: [f"{shared} for {name}"] for name in generator.HELD_OUT_FAMILIES}
    families["training_family"] = [shared.upper() + "!"]
    monkeypatch.setattr(generator, "load_families", lambda: families)
    output = tmp_path / "refused.jsonl"
    with pytest.raises(SystemExit):
        generator.main(["--output", str(output)])
    assert not output.exists()


def test_the_readme_states_every_family_and_count(
    generator: ModuleType, rows: list[dict[str, str]]
) -> None:
    readme = (PROMPTS_DIR / "README.md").read_text(encoding="utf-8")
    for name, count in Counter(row["source"] for row in rows).items():
        split = "**held out**" if name in generator.HELD_OUT_FAMILIES else "training"
        assert f"| `{name}` | {count} | {split} |" in readme
    assert f"{len(rows)} short prompts" in readme
