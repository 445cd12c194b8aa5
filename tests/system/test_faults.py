"""Every kind of process killed in one run, and each row still trained once an epoch, paid for once.

The teacher's engine is synthetic, behind the real deployment; stream, store, workers, checkpoints
are the real ones. A counting student proves it without trusting the ledger.
"""

import contextlib
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from raystill.base.records import read_lines
from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import PROMPT_SCHEMA
from raystill.datasets.rows.signal import signal_of
from raystill.datasets.store.reading import GoneSegment
from raystill.datasets.store.store import SEGMENTS, RowCounts, TeacherStore
from raystill.datasets.store.upkeep import verify
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.spec import StreamSpec
from raystill.run import Run
from raystill.serve.deploy import TeacherApp
from raystill.train.checkpoint.checkpoint import read_snapshot
from raystill.train.checkpoint.ray_register import registered_names
from raystill.train.worker.fit import fit
from tests.support import counting_student
from tests.support.end_to_end import TEACHER, children_of, named
from tests.support.paid import rows_requested_by
from tests.support.runs import run_of

pytestmark = pytest.mark.ray

NUM_ROWS, EPOCHS, GROUP_ROWS, ROWS_PER_STEP = 161, 2, 8, 16
GROUPS_IN_FLIGHT = 4
PATIENCE_S = 1200
POISON_ROW = 70
LONG_RUN = 24  # Faults of a chaos run.
KINDS = {
    "replica": "ray::ServeReplica:teacher-run",
    "worker": "ray::RayTrainWorker",
    "answer stage": "ray::MapWorker(MapBatches(AnswerGroup))",
    "source": "ray::ReadPlan",
    "splitter": "ray::SplitCoordinator",
}


def config_of(order: str, num_workers: int, epochs: int = EPOCHS) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {
                "model": str(TEACHER),
                "engine": "synthetic",
                "synthetic": {"vocab_size": 49152, "response_tokens": 8, "delay_s": 0.3},
                "target_ongoing_requests": GROUPS_IN_FLIGHT,
                "num_replicas": 1,
                "sampling": {"max_tokens": 8},
            },
            "student": {"layers": [0]},
            "prompts": {"path": "unused"},
            "signal": {"top_k": 8},
            "stream": {"group_rows": GROUP_ROWS, "order": order},
            "training": {
                "epochs": epochs,
                "schedule": "constant",
                "rows_per_step": ROWS_PER_STEP,
                "num_workers": num_workers,
                "cpus_per_worker": 0.5,
                "checkpoint_every_steps": 2,
                "max_failures": 40,
            },
        }
    )


@dataclass
class Chaos:
    """Kills one process of a kind each time the run has got a little further."""

    coordinator: object
    kinds: list[str]
    seed: int
    killed: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        generator = random.Random(self.seed)
        for kind in self.kinds:
            before = self.rows()
            while not self.over.is_set() and self.rows() < before + ROWS_PER_STEP:
                time.sleep(0.1)
            time.sleep(generator.uniform(0, 0.5))
            while not self.over.is_set() and not self.kill(kind, generator):
                time.sleep(0.05)  # Between two lives of it.

    def rows(self) -> int:
        """Rows the student was given so far, repeated ones included."""
        counters = ray.get(self.coordinator.snapshot.remote()).counters
        return counters.get("student_rows", 0)

    def kill(self, kind: str, generator: random.Random) -> bool:
        pids = named(children_of(os.getpid()), KINDS[kind])
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(generator.choice(pids), signal.SIGKILL)
            self.killed.append(kind)
        return True


@dataclass
class Ended:
    """What a run left."""

    folder: RunFolder
    store: TeacherStore
    snapshot: Snapshot
    killed: list[str]
    epochs: int


def run_through(place: Path, config: RunConfig, kinds: list[str], seed: int) -> Ended:
    """A counting run on the shared cluster, with its processes killed one after another."""
    folder = RunFolder(str(place / "run")).ensure()
    columns = {
        "row": list(range(NUM_ROWS)),
        "key": [row.to_bytes(16, "big") for row in range(NUM_ROWS)],
        "prompt_ids": [[5 + row, 7] for row in range(NUM_ROWS)],
        "source": ["s"] * NUM_ROWS,
        "response_ids": [None] * NUM_ROWS,
    }
    folder.write_table("prompts/train.parquet", pa.table(columns, schema=PROMPT_SCHEMA))
    drops = config.stream.max_drop_fraction
    bounds = config.rows_ahead, NUM_ROWS, drops, config.refill_rows
    coordinator = start_coordinator(f"chaos-{place.name}", *bounds)
    store = TeacherStore(str(place / "store"))
    more = {"store_path": store.path, "num_rows": NUM_ROWS, "coordinator": coordinator}
    run = run_of(config, folder, str(TEACHER), **more)
    chaos = Chaos(coordinator, kinds, seed)
    watcher = threading.Thread(target=chaos.run)
    teacher = TeacherApp.of(run)
    teacher.deploy()
    watcher.start()
    try:
        snapshot = fit_beside(run, StreamSpec.of(run, signal_of(config.signal, {})))
    finally:
        chaos.over.set()
        watcher.join()
        teacher.end()
        ray.kill(coordinator)
    return Ended(folder, store, snapshot, chaos.killed, config.training.epochs)


def fit_beside(run: Run, spec: StreamSpec) -> Snapshot:
    """``fit`` outside the main thread, as in the driver; the coordinator's last snapshot."""
    outcome: dict = {}

    def work() -> None:
        try:
            fit(run, spec, loop=counting_student.counting_worker)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the run did not end"
    if "error" in outcome:
        raise outcome["error"]
    return ray.get(run.coordinator.snapshot.remote())


def check_exact(ended: Ended) -> None:
    """Each row stepped over once an epoch; each paid for once; nothing missing or damaged."""
    counts = ended.folder.read_text(counting_student.COUNTS)
    assert counts == str([float(ended.epochs)] * NUM_ROWS)
    catalogue = ended.store.catalogue()
    assert (catalogue.rows, catalogue.duplicates, catalogue.refused) == (NUM_ROWS, 0, {})
    assert verify(ended.store) == {}
    assert rows_requested_by(catalogue, "run")["training"] == RowCounts(NUM_ROWS)
    lines = read_lines(ended.folder, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["rows"] for line in lines) == NUM_ROWS * ended.epochs
    last = read_snapshot(ended.folder.local / "checkpoints" / max(registered_names(ended.folder)))
    assert (last.epoch, Ledger.from_dict(last.ledger).num_trained) == (ended.epochs - 1, NUM_ROWS)


@pytest.fixture(scope="module", autouse=True)
def by_value(ray_serve):
    """Workers cannot import the tests."""
    ray.cloudpickle.register_pickle_by_value(counting_student)
    yield
    ray.cloudpickle.unregister_pickle_by_value(counting_student)


def test_five_faults_of_five_kinds_lose_and_repeat_no_row(tmp_path: Path) -> None:
    ended = run_through(tmp_path, config_of("fixed", 2), list(KINDS), seed=11)
    assert sorted(ended.killed) == sorted(KINDS), "the run ended before all faults had come"
    check_exact(ended)
    told = ended.snapshot.counters
    in_flight = len(KINDS) * GROUPS_IN_FLIGHT * GROUP_ROWS
    assert NUM_ROWS <= told["teacher_rows"] <= NUM_ROWS + in_flight
    assert ended.snapshot.lives > 1


@pytest.mark.chaos
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("seed", [1, 2, int(os.environ.get("CHAOS_SEED", time.time()))])
def test_a_long_run_of_faults(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    order = ("arrival", "fixed")[seed % 2]
    kinds = [*KINDS, *generator.choices(list(KINDS), k=LONG_RUN - len(KINDS))]
    generator.shuffle(kinds)
    print(f"order {order}, CHAOS_SEED={seed}: {', '.join(kinds)}")
    ended = run_through(tmp_path, config_of(order, 2, epochs=8), kinds, seed)
    assert set(ended.killed) == set(KINDS) and len(ended.killed) >= 20
    check_exact(ended)


@pytest.mark.faults
def test_a_row_that_kills_its_replica_each_time_is_dropped_and_the_others_are_not(
    tmp_path: Path,
) -> None:
    """Real replicas die of it; every other row of its group, and of those beside it, is trained."""
    config = config_of("arrival", 2, epochs=2).model_dump()
    config["teacher"]["synthetic"]["poison_token"] = 5 + POISON_ROW
    config["stream"]["max_drop_fraction"] = 1 / NUM_ROWS
    ended = run_through(tmp_path, RunConfig.model_validate(config), [], seed=0)
    counts = json.loads(ended.folder.read_text(counting_student.COUNTS))
    assert counts == [0.0 if row == POISON_ROW else 2.0 for row in range(NUM_ROWS)]
    assert ended.snapshot.dropped == {"poison": 1}
    catalogue = ended.store.catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS - 1, 0)


@pytest.mark.faults
def test_damage_done_to_the_store_between_epochs_is_asked_again(tmp_path: Path) -> None:
    """A run on a store of which segments were altered, cut and deleted."""
    config = config_of("arrival", 2, epochs=1)
    first = run_through(tmp_path / "first", config, [], seed=0)
    check_exact(first)
    store = first.store
    rows = {entry.name: entry.footer.rows for entry in store.catalogue().entries}
    altered, cut, gone, *_ = (Path(store.path) / SEGMENTS / name for name in sorted(rows))
    data = bytearray(altered.read_bytes())
    data[len(data) // 3] ^= 1
    altered.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-7])
    gone.unlink()
    bad = {*verify(store), gone.name}
    assert bad == {altered.name, cut.name, gone.name}
    (tmp_path / "second").mkdir()
    os.rename(store.path, tmp_path / "second" / "store")
    second = run_through(tmp_path / "second", config, [], seed=0)
    assert second.snapshot.counters["teacher_rows"] == sum(rows[name] for name in bad)
    check_exact(second)


def test_a_segment_that_cannot_be_trusted_names_itself(tmp_path: Path) -> None:
    store = TeacherStore(str(tmp_path))
    with pytest.raises(GoneSegment, match=r"segment none\.parquet"):
        store.open("none.parquet")
