"""TensorBoard's events, read back: the newest figures of each step, lost steps replaced."""

import struct
from pathlib import Path

import pytest

from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.exporters import TensorBoard


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of each event, in the order written."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # A length of 8 bytes and its checksum, the event, its checksum.
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def step(number: int, loss: float | None, evaluation: dict | None = None) -> Snapshot:
    progress = {"step": number, "loss": loss, "time": 1.0, "objective/forward_kl": 0.5}
    return Snapshot(progress=progress, evaluation=evaluation or {})


def test_each_new_step_and_evaluation_is_written_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.update(Snapshot())
    assert not list(tmp_path.iterdir())
    evaluation = {"step": 0, "kl_nats_per_token": 2.0, "bound": "lower"}
    board.update(Snapshot(evaluation=evaluation))
    for number, loss in ((1, 3.0), (1, 3.0), (2, None), (3, 1.0)):
        board.update(step(number, loss, evaluation))
    board.close()
    assert scalars(tmp_path) == [
        ("held_out/kl_nats_per_token", 0, 2.0),
        ("train/loss", 1, 3.0),
        ("train/objective/forward_kl", 1, 0.5),
        ("train/objective/forward_kl", 2, 0.5),
        ("train/loss", 3, 1.0),
        ("train/objective/forward_kl", 3, 0.5),
    ]


def test_means_of_checks_are_written_too(tmp_path: Path) -> None:
    check = {"student": {"mean": 0.25}, "teacher": {"mean": None}, "is_share": True}
    board = TensorBoard(tmp_path)
    board.update(Snapshot(evaluation={"step": 8, "checks": {"is_json": check}}))
    board.close()
    assert scalars(tmp_path) == [("held_out/checks/is_json/student", 8, 0.25)]


def test_steps_that_are_trained_again_replace_the_lost_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    board = TensorBoard(tmp_path)
    original = board._open
    monkeypatch.setattr(board, "_open", lambda at: (opened.append(at), original(at)))
    for snapshot in (step(4, 3.0), step(5, 2.0), step(4, 2.5), step(5, 2.0)):
        board.update(snapshot)
    board.close()
    assert opened == [4, 4]  # From there on a viewer forgets what came before.
