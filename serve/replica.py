"""The teacher replica: one engine behind Ray Serve that answers groups of prompts.

Where it sits: ``deploy.py`` places it; the stream's answer stage and the held-out task call
``sample`` or ``score`` with a group's rows and get an Arrow table back. *Unblocks*: the student, by
way of the stream. *Reports*: rows, tokens and busy seconds, to the coordinator, after each group.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raystill.base.errors import RunError
from raystill.base.logs import redirect_output, run_name
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import ENGINE, ONE_BY_ONE, of_one
from raystill.datasets.rows.signal import Signal
from raystill.model.identity import dtype_problem, identity_of_teacher, identity_problem
from raystill.model.on_node import ModelSource, Weights
from raystill.model.sampling import ResolvedSampling, resolve_sampling
from raystill.placement.requests import share_of_cores, teacher_cores
from raystill.serve.ending import Ending
from raystill.serve.engine.arguments import EngineSettings, label_replica, prepare_process
from raystill.serve.engine.synthetic import SyntheticEngine
from raystill.serve.engines import ChatEngine, Engine, Ids, KeyedEngine, MortalEngine
from raystill.serve.listening import rank_at_serve


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings of a replica. ``logs`` is None where output stays with Ray's own logs.

    ``teacher_identity``: the driver's, which is in the keys of all answers; None: not compared.
    ``run_folder``, ``store_path``: of the run that the teacher answers; None outside a run.
    ``name``: that of the teacher among several. ``cores_before``: replicas of others that may come
    to stand before this teacher's on a node, among ``replicas_per_node``. ``pace``: of a service
    that other teachers ask too, and the salt of its accounts.
    """

    config: RunConfig
    model: ModelSource
    coordinator: Any
    logs: str | None
    gpus: int
    replicas_per_node: int
    teacher_identity: str | None = None
    run_folder: str | None = None
    store_path: str | None = None
    name: str = ""
    cores_before: int = 0
    pace: tuple[Any, str] | None = None

    @property
    def role(self) -> str:
        """What a replica's logs call it: ``teacher``, or ``teacher-NAME``."""
        return f"teacher-{self.name}" if self.name else "teacher"


class Teacher:
    """A Serve deployment's class; a replica is ready when its engine has loaded the model."""

    # Serve awaits an asynchronous constructor, so that the engine starts within its event loop.
    async def __init__(  # type: ignore[misc]
        self, settings: ReplicaSettings, rank: tuple[int, int] | None = None
    ) -> None:
        """``rank``: (replica number, replica number on this node); default: asked of Serve."""
        self._settings = settings
        number, number_on_node = rank if rank is not None else rank_at_serve()
        self._log: str | None = None
        if settings.logs is not None:
            self._log = str(Path(settings.logs) / f"{settings.role}-{number}.log")
            redirect_output(self._log)
            label_replica(run_name(str(Path(settings.logs).parent)), number, settings.role)
        self._busy = BusyClock()
        self._ending = Ending("replica")
        self._identity: str | None = None
        teacher = settings.config.teacher
        weights: Weights = "all" if teacher.engine == "vllm" else "none"
        self._folder = await asyncio.to_thread(settings.model.on_this_node, weights)
        self._sampling = resolve_sampling(teacher, self._folder)
        # A thread that begins at once: the engine's start blocks the event loop.
        loop = asyncio.get_running_loop()
        compared = loop.run_in_executor(None, _files_problem, settings, self._folder)
        self._engine = build_engine(settings, self._folder, self._sampling, number, number_on_node)
        await self._engine.start()
        problem = await compared
        if teacher.engine == "vllm":
            problem = problem or dtype_problem(teacher, self._folder, self._engine.dtype)
        if problem is not None:
            self._engine.close()
            raise RunError(problem)

    async def sample(self, prompts: pa.Table, signal: Signal) -> pa.Table:
        """Answer each row of ``prompts``: an ``answer_schema`` table.

        prompts: ``prompt_ids``; ``key`` of each answer and ``messages``, which few engines need;
        `ONE_BY_ONE`, which changes nothing where rows cannot kill the engine.
        """
        groups = ids_of(prompts, "prompt_ids")
        engine = self._engine
        if "messages" in prompts.column_names and isinstance(engine, ChatEngine):
            asked = engine.sample_chats(groups, prompts["messages"].to_pylist(), signal)
        elif isinstance(engine, KeyedEngine):
            asked = engine.sample_keyed(groups, prompts["key"].to_pylist(), signal)
        elif ONE_BY_ONE in prompts.column_names and isinstance(engine, MortalEngine):
            asked = engine.sample(groups, signal, one_by_one=True)
        else:
            asked = engine.sample(groups, signal)
        table, answers = await self._table(signal, asked)
        self._report(groups, answers, written=True)
        return table

    async def score(self, rows: pa.Table, signal: Signal) -> pa.Table:
        """The signal of given responses, as ``answer_schema``, with the responses as they came.

        rows: ``prompt_ids``, ``response_ids`` and, to have the teacher's logprobs at ids of the
        caller's choice with ``topk``, ``ids``: K of them for each response token, distinct. Or
        `ONE_BY_ONE`, as for :meth:`sample`.
        ``finish_reason`` is ``stop`` where the last id is one that ends this teacher's answers.
        """
        prompts, responses = ids_of(rows, "prompt_ids"), ids_of(rows, "response_ids")
        at = ids_of(rows, "ids") if "ids" in rows.column_names else None
        engine = self._engine
        if ONE_BY_ONE in rows.column_names and isinstance(engine, MortalEngine):
            scored = engine.score(prompts, responses, signal, one_by_one=True)
        else:
            scored = engine.score(prompts, responses, signal, at)
        table, answers = await self._table(signal, self._with_reason(scored))
        self._report(prompts, answers, written=False)
        return table

    async def identity(self) -> str:
        """The teacher's identity, worked out from the files this replica has loaded."""
        if self._identity is None:
            teacher = self._settings.config.teacher
            self._identity = await asyncio.to_thread(identity_of_teacher, teacher, self._folder)
        return self._identity

    async def info(self) -> dict[str, Any]:
        """Which engine answers, and what it can take."""
        engine = self._engine
        return {
            **self._engine_facts(),
            "max_model_len": engine.max_model_len,
            "gpus": self._settings.gpus,
            "cores": sorted(os.sched_getaffinity(0)),
            "log": self._log,
            "pid": os.getpid(),
            "notices": notices(engine, self._settings.gpus),
        }

    def _engine_facts(self) -> dict[str, Any]:
        """What is stored with every answer."""
        engine = self._engine
        return {
            "engine": engine.name,
            "version": engine.version,
            "dtype": engine.dtype,
            "vocab_size": engine.vocab_size,
        }

    async def check_health(self) -> None:
        """Called by Serve: one token within a time limit, else the replica is replaced."""
        try:
            await self._engine.probe()
        except Exception as error:
            self._exit_if_engine_died(error)
            raise

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()

    async def _with_reason(self, scored: Awaitable[list[Answer]]) -> list[Answer]:
        stops = self._sampling.stop_token_ids
        return [
            a
            if a.error
            else replace(a, finish_reason="stop" if a.response_ids[-1] in stops else "length")
            for a in await scored
        ]

    async def _table(
        self, signal: Signal, asked: Awaitable[list[Answer]]
    ) -> tuple[pa.Table, list[Answer]]:
        """What the engine says, as Arrow and as it came."""
        with self._busy.group():
            try:
                answers = await asked
            except Exception as error:
                self._exit_if_engine_died(error)
                raise
            if isinstance(self._engine, MortalEngine):
                self._ending.after(answers)
            table = await asyncio.to_thread(answers_table, answers, signal)
        facts = {ENGINE: json.dumps(self._engine_facts())}
        return table.replace_schema_metadata(facts), answers

    def _exit_if_engine_died(self, error: Exception) -> None:
        if isinstance(self._engine, MortalEngine):
            self._ending.after_error(error)

    def _report(self, prompts: Ids, answers: list[Answer], written: bool) -> None:
        """Count what was done; responses that were not written here were read, like prompts."""
        coordinator = self._settings.coordinator
        if coordinator is None:
            return
        answered = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.error is None]
        read = sum(len(p) for p, _ in answered)
        responses = sum(len(a.response_ids) for _, a in answered)
        counters = {
            "teacher_rows": len(answered),
            "teacher_prompt_tokens": read if written else read + responses,
            "teacher_response_tokens": responses if written else 0,
            "teacher_busy_s": self._busy.take(),
        }
        if name := self._settings.name:
            counters |= {of_one(name, counter): count for counter, count in counters.items()}
        coordinator.add.remote(counters)


def _files_problem(settings: ReplicaSettings, folder: str) -> str | None:
    """Why the files in ``folder`` are not those whose identity the driver put into the keys.

    The synthetic engine has no files; its identity is a hash of the settings it is given.
    """
    teacher, expected = settings.config.teacher, settings.teacher_identity
    if teacher.engine == "synthetic" or expected is None:
        return None
    return identity_problem(teacher, folder, expected)


def build_engine(
    settings: ReplicaSettings,
    folder: str,
    sampling: ResolvedSampling,
    number: int,
    number_on_node: int,
) -> Engine:
    """The configured engine, in a process prepared for it; ``folder``: the model's, on this node.

    Pipeline stages may lie on other nodes: each finds the model by its name, at the same commit.
    """
    config = settings.config
    teacher = config.teacher
    if teacher.engine == "synthetic":
        return SyntheticEngine(teacher.synthetic, sampling, teacher.max_model_len)
    if teacher.engine == "api":
        from raystill.serve.services import api_engine

        assert settings.run_folder is not None, "an API teacher belongs to a run"
        run_folder = RunFolder(settings.run_folder)
        assert settings.store_path is not None, "an API teacher belongs to a run"
        coordinator, store = settings.coordinator, settings.store_path
        own = (settings.name, settings.pace)
        return api_engine(config, folder, sampling, run_folder, coordinator, store, *own)
    cores = None
    if settings.gpus == 0:
        available = sorted(os.sched_getaffinity(0))
        cores = share_of_cores(
            teacher_cores(config, available),
            settings.cores_before + number_on_node,
            settings.replicas_per_node,
        )
    prepare_process(cores)
    by_name = cores is None and teacher.pipeline_parallel_size > 1 and settings.model.commit
    if not by_name:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from raystill.serve.engine.vllm import VllmEngine  # Here: the driver imports this module.

    root_seed = config.section_seeds()["engine"] if teacher.seed is None else teacher.seed
    return VllmEngine(
        EngineSettings(
            teacher=teacher,
            model=settings.model.name if by_name else folder,
            revision=settings.model.commit if by_name else None,
            sampling=sampling,
            seed=root_seed + number,  # replicas must not draw the same numbers
            max_top_k=max(config.signal.top_k, config.evaluation.top_k),
            cores=cores,
        )
    )


def ids_of(rows: pa.Table, name: str) -> Ids:
    """The ids of each row, as views on the table's own buffer: [T], or [T, K] of lists of K."""
    ids: Ids = []
    for chunk in rows[name].chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values
        if pa.types.is_fixed_size_list(values.type):
            width = values.type.list_size
            array = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        else:
            array = values.to_numpy(zero_copy_only=False)
        ids += [array[a:b] for a, b in itertools.pairwise(offsets)]
    return ids


def notices(engine: Engine, gpus: int) -> list[str]:
    """What the owner of the run may want to change."""
    if gpus or engine.dtype != "bfloat16" or cpu_has_bfloat16():
        return []
    return [
        "teacher.dtype is bfloat16 but this CPU has no bfloat16 instructions (avx512_bf16, "
        "amx_bf16), so it is emulated; teacher.dtype: float32 answers about 3 times as fast"
    ]


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; True where Linux does not tell x86 flags."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx2" not in flags or "bf16" in flags


class BusyClock:
    """Wall time during which at least one group was in flight."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._since = 0.0
        self._busy_s = 0.0

    @contextmanager
    def group(self) -> Iterator[None]:
        """Marks one group in flight."""
        if self._in_flight == 0:
            self._since = time.monotonic()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += time.monotonic() - self._since

    def take(self) -> float:
        """Busy seconds since the last call."""
        now = time.monotonic()
        if self._in_flight:
            self._busy_s += now - self._since
            self._since = now
        taken, self._busy_s = self._busy_s, 0.0
        return taken
