"""What `calibrate` tells a person: the cheapest signal that will do, tables, plot, refusals."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import driver
from raystill.base.run_folder import RunFolder
from raystill.cluster.commands.calibrate_report import (
    cheapest,
    conclusions,
    plot,
    print_calibration,
    write_calibration,
)
from tests.cluster.test_driver import TINY, listed

SIGNALS = {"text": 4.0, "topk 8": 60.0, "topk 64": 400.0, "hidden 64": 110.0}


def found(cosine=0.95, topk=(0.9, 0.99), students=("initial",)):
    """A calibration's figures: cosines of ``topk`` 8 and 64; hidden is cheaper than 64 ids."""
    cosines = dict(zip(SIGNALS, (0.4, *topk, 1.0), strict=True))
    figures = {
        name: {
            "loss_ratio": None if name == "text" else value,
            "cosine_logits": value,
            "cosine_parameters": value,
            "student_mass": None if name == "text" else 0.5,
        }
        for name, value in cosines.items()
    }
    objectives = {"forward_kl": {"full_loss": 1.5, "signals": figures}}
    return {
        "cosine": cosine,
        "notes": ["only the untrained student was compared"],
        "positions": 400,
        "rows": 25,
        "signals": {
            name: {
                "kind": name.partition(" ")[0],
                "width": 64,
                "bytes_per_token": size,
                "teacher_mass": None if name == "text" else 0.75,
            }
            for name, size in SIGNALS.items()
        },
        "costs": {"forward_kl": {n: {"seconds": 0.25, "peak_bytes": None} for n in SIGNALS}},
        "students": {name: {"folder": None, "objectives": objectives} for name in students},
    }


@pytest.mark.parametrize(
    ("cosine", "expected"), [(0.3, "text"), (0.9, "topk 8"), (0.95, "hidden 64")]
)
def test_the_cheapest_is_by_bytes_and_not_by_its_place(cosine, expected) -> None:
    assert cheapest(found(cosine), "initial", "forward_kl") == expected


def test_where_nothing_is_to_be_learned_no_signal_is_named() -> None:
    figures = found()
    for of in figures["students"]["initial"]["objectives"]["forward_kl"]["signals"].values():
        of["cosine_parameters"] = None
    assert cheapest(figures, "initial", "forward_kl") is None
    assert conclusions(figures) == ["forward_kl, initial student: no signal: its gradient is 0"]
    assert plot(figures).startswith(b"<?xml")


def test_the_table_and_the_conclusions_are_printed() -> None:
    shown = io.StringIO()
    print_calibration(found(students=("initial", "trained")), Console(file=shown, width=110))
    lines = shown.getvalue().splitlines()
    assert "forward_kl, initial student: 1.500 a token" in shown.getvalue()
    (row, _) = [line.split() for line in lines if line.startswith("topk 8")]
    assert row == [
        "topk",
        "8",
        "60.0",
        "0.7500",
        "0.5000",
        "0.9000",
        "0.9000",
        "0.9000",
        "250",
        "-",
    ]
    for student in ("initial", "trained"):
        assert f"  forward_kl, {student} student: hidden 64 (cosine 1.0000, 110 bytes)" in lines
    assert "note: only the untrained student was compared" in lines
    assert all(line == line.rstrip() and len(line) <= 110 for line in lines)


def test_the_figures_and_the_plot_are_written(tmp_path: Path) -> None:
    write_calibration(RunFolder(str(tmp_path)), found(students=("initial", "trained")))
    told = json.loads((tmp_path / "calibration.json").read_text())
    assert told["cheapest"]["trained"] == {"forward_kl": "hidden 64"}
    drawn = (tmp_path / "calibration.svg").read_text()
    assert drawn.startswith("<?xml") and drawn.rstrip().endswith("</svg>")


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "Count."}\n{"prompt": "Add."}\n')
    Path("run.yaml").write_text(
        f"teacher: {{model: {TINY}, max_model_len: 64, sampling: {{max_tokens: 8}}}}\n"
        "student: {layers: [0]}\nprompts: {path: prompts.jsonl}\nevaluation: {held_out_rows: 1}\n"
    )
    return "run.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "training.rows_per_step=many"], "training.rows_per_step: is 'many'"),
        (
            ["--set", "teacher.engine=synthetic", "--set", "teacher.synthetic.vocab_size=49152"],
            "teacher.engine: is 'synthetic', which has no hidden states",
        ),
        (["--student", "nowhere"], "--student: there is no folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(run_file, words, expected, capsys) -> None:
    assert driver.main(["calibrate", run_file, *words]) == driver.EXIT_REFUSED
    shown = capsys.readouterr()
    (problem,) = listed(shown.err, shown.out)
    assert expected in problem
    assert not Path("runs").exists()
