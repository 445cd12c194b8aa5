"""What all sides share: rows, lengths, steps, sampling and students; and where things are kept.

Standard library only: the rivals' scripts import it in their own environment.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TEACHER = "models/SmolLM2-135M-Instruct"
PROMPTS = "examples/prompts/quickstart.jsonl"
HELD_OUT_SOURCES = ("advice", "comparisons", "definitions", "travel_plans")
LOOKED_AT = 416
"""Prompts of the file that are looked at; the held-out ones are among them."""


@dataclass(frozen=True)
class Settings:
    """The job, the same for all sides.

    ``layers``: how many of the teacher's layers the first, the second and the third student keep.
    """

    rows: int = 160
    held_out: int = 48
    layers: tuple[int, ...] = (22, 18, 14)
    rows_per_step: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 4
    min_rate_ratio: float = 0.1
    max_tokens: int = 64
    temperature: float = 0.7
    min_p: float = 0.05
    seed: int = 7
    cores: int = 2

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.rows // self.rows_per_step)

    def save(self, work: Path) -> None:
        """Keep them in the work folder, or compare: one folder holds one job.

        Raises SystemExit where the folder holds parts of another job.
        """
        path = work / "settings.json"
        mine = json.loads(json.dumps(asdict(self)))
        if path.exists() and (others := read_json(path)) != mine:
            differ = {k: (others.get(k), v) for k, v in mine.items() if others.get(k) != v}
            raise SystemExit(
                f"{work} holds parts of another job (setting: theirs, yours): {differ}; "
                "choose another --work, or remove that folder"
            )
        write_json(path, mine)

    @staticmethod
    def load(work: Path) -> "Settings":
        """Those of a work folder."""
        raw = read_json(work / "settings.json")
        return Settings(**{**raw, "layers": tuple(raw["layers"])})


@dataclass(frozen=True)
class Folder:
    """Paths inside a work folder."""

    work: Path

    @property
    def train(self) -> Path:
        """Prompts to train on, JSONL."""
        return self.work / "material" / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Held-out prompts with the teacher's answers, token ids, JSON."""
        return self.work / "material" / "held_out.json"

    @property
    def chosen(self) -> Path:
        """Teacher layers by their influence, JSON."""
        return self.work / "material" / "layers.json"

    def start(self, name: str) -> Path:
        """A student's first weights: ``even`` or its number of layers by influence."""
        return self.work / "material" / f"start-{name}"

    def answers(self, side: str) -> Path:
        """The teacher's answers to the training prompts by one side, JSONL of token ids."""
        return self.work / "answers" / f"{side}.jsonl"

    def student(self, side: str, which: int | str) -> Path:
        """A trained student."""
        return self.work / "students" / f"{side}-{which}"

    def part(self, name: str) -> Path:
        """The record of a finished part."""
        return self.work / "parts" / f"{name}.json"


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def training_prompts(looked_at: int) -> list[dict[str, Any]]:
    """Prompts of the first lines of the demo's file that are not of the held-out sources."""
    rows = read_lines(Path(PROMPTS))[:looked_at]
    return [row for row in rows if row["source"] not in HELD_OUT_SOURCES]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)
