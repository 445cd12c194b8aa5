"""The sampler: a Serve replica that answers with the student's own weights and follows them.

Where it sits: `sampler_app` places it; the stream's answer stage calls ``sample``. *Waits for* the
weights that rank 0 publishes; a new replica pulls the newest ones before it is ready. *Unblocks*
the source's credits, by telling the coordinator which version it answers with. *Reports*: rows,
tokens and busy seconds, to the coordinator, after each group.

Each new version is proven: the logprobs of a fixed probe must be those that the trained student
gives. A sampler that does not follow stops the run.
"""

import asyncio
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raystill.base.errors import RunError
from raystill.base.logs import redirect_output, run_name, write_line
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import AT_LEAST, ONE_BY_ONE
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import with_spans
from raystill.model.adapters import ADAPTER_SETTINGS, adapted_modules, served_rank
from raystill.model.files import WEIGHTS_FILE, read_object
from raystill.model.sampling import ResolvedSampling
from raystill.placement.requests import share_of_cores, teacher_cores
from raystill.serve.ending import Ending
from raystill.serve.engine.arguments import (
    AdapterLimits,
    EngineSettings,
    label_replica,
    move_threads,
    prepare_process,
)
from raystill.serve.engine.weights import EXTENSION
from raystill.serve.listening import rank_at_serve
from raystill.serve.replica import BusyClock, ids_of
from raystill.serve.scratch import Scratch

MOST_ADAPTERS = 16
"""Adapters for which the engine makes room."""
GAPS = {"float32": 1e-3}
GAP_OF_OTHERS = 0.5
"""Nats, by precision: what is allowed where ``policy.max_logprob_gap`` is not set.

Random ids have logprobs near -14, which bfloat16 moves much: those of the quickstart's student in
bfloat16 and of the same under autocast were 0.09 to 0.24 apart, by the ids (six draws); those of a
student before and after 20 steps with a learning rate of 3e-4, in float32, 1.0 to 1.6.
"""


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler. gpus: those that the replica holds; 0 on a CPU.

    context: most tokens of a prompt and its answer that the teacher reads; None: not known.
    """

    config: RunConfig
    coordinator: Any
    logs: str
    gpus: int = 0
    context: int | None = None


class Sampler:
    """A Serve deployment's class; ready when its engine has the newest weights and proved them."""

    # Serve awaits an asynchronous constructor, so that the engine starts within its event loop.
    async def __init__(self, settings: SamplerSettings) -> None:  # type: ignore[misc]
        self._settings = settings
        self._coordinator = settings.coordinator
        self._number, self._number_on_node = rank_at_serve()
        redirect_output(str(Path(settings.logs) / f"sampler-{self._number}.log"))
        label_replica(run_name(str(Path(settings.logs).parent)), self._number, role="sampler")
        self._changed = asyncio.Condition()
        self._busy = BusyClock()
        self._ending = Ending("sampler", self._clean_up)
        newest = await self._coordinator.newer_policy.remote(0)
        if newest is None:
            raise RunError("the run ended before the student's weights were published")
        sent = await newest["weights"][0]
        room = versions_kept(settings.config) * sum(
            memoryview(part).nbytes for part in sent.values()
        )
        self._scratch = Scratch(room)
        self._folder = self._scratch.path
        try:
            await self._start(newest)
        except BaseException:
            self._clean_up()
            raise
        self._following = asyncio.ensure_future(self._follow())

    async def sample(self, prompts: pa.Table, signal: Signal) -> pa.Table:
        """Responses to ``prompt_ids`` as an ``answer_schema`` table of ``text``.

        ``finish_reason`` says which weights wrote which tokens: see `datasets.rows.versions`.
        prompts: with the column `AT_LEAST`, no token is written by older weights than that. They
        are waited for: another replica may have been the first to get them. With `ONE_BY_ONE`, as
        for `Teacher.sample`.
        """
        groups = ids_of(prompts, "prompt_ids")
        self._raise_if_lost()
        if AT_LEAST in prompts.column_names:
            limit = self._settings.config.teacher.request_timeout_s
            await self._reach(pc.max(prompts[AT_LEAST]).as_py(), limit)
        one_by_one = ONE_BY_ONE in prompts.column_names
        with self._busy.group():
            try:
                answers = await self._engine.sample(groups, signal, one_by_one)
            except Exception as error:
                self._ending.after_error(error)
                raise
            self._ending.after(answers)
        self._raise_if_lost()  # Since they were asked for.
        self._report(answers)
        return await asyncio.to_thread(answers_table, [named(a) for a in answers], signal)

    async def check_health(self) -> None:
        """Called by Serve: the engine gives a token, and new weights are still awaited."""
        self._raise_if_lost()
        try:
            await self._engine.probe()
        except Exception as error:
            self._ending.after_error(error)
            raise

    def __del__(self) -> None:
        self._clean_up()

    def _raise_if_lost(self) -> None:
        """RuntimeError where new weights could not be taken: the engine may have half of them."""
        if self._following.done() and (error := self._following.exception()) is not None:
            self._ending.after_error(error)
            raise RuntimeError(f"new weights could not be taken: {error!r}")

    def _report(self, answers: list[Answer]) -> None:
        written = [answer for answer in answers if answer.error is None]
        counters = {
            "sampler_rows": len(written),
            "sampler_response_tokens": sum(len(answer.response_ids) for answer in written),
            "sampler_busy_s": self._busy.take(),
        }
        self._coordinator.add.remote(counters)

    async def _reach(self, version: int, limit_s: float | None) -> None:
        """Wait until this replica answers with weights of ``version`` or newer."""

        def reached() -> bool:
            return self._version >= version

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(reached), limit_s)
            except TimeoutError:
                raise RunError(
                    f"sampler {self._number} has the student's weights of step {self._version}, "
                    f"and those of step {version} have not come within "
                    f"teacher.request_timeout_s ({limit_s} s)"
                ) from None

    async def _start(self, newest: dict[str, Any]) -> None:
        files = await newest["files"][0]
        for name, content in files.items():
            await asyncio.to_thread(self._scratch.write, name, content)
        settings = self._settings
        if served_rank(settings.config) is None:
            await self._write_weights(newest)
        cores, every = None, sorted(os.sched_getaffinity(0))
        if settings.gpus == 0:
            most = settings.config.policy.max_replicas
            teachers = teacher_cores(settings.config, every)
            cores = share_of_cores(teachers, self._number_on_node, most)
        prepare_process(cores, load_on=every)  # The teacher loads on its cores; the student waits.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from raystill.serve.engine.vllm import VllmEngine  # Here: the driver imports this module.

        drawn = settings.config.policy.max_replicas * newest["serial"] + self._number
        engine = engine_settings(settings, self._folder, newest, cores, drawn)
        if (rank := served_rank(settings.config)) is not None:
            sent = await newest["weights"][0]
            modules = adapted_modules(bytes(sent[ADAPTER_SETTINGS]))
            limits = AdapterLimits(rank, modules, versions_in_flight(settings.config))
            engine = replace(engine, adapters=limits)
        self._engine = VllmEngine(engine)
        await self._engine.start()
        if cores is not None:
            move_threads(cores)
        if served_rank(settings.config) is not None:
            await self._take_adapter(newest)
        else:
            await self._engine.name_weights(newest["version"])
        await self._prove(newest)

    async def _follow(self) -> None:
        """Take each newer version, until the run is over."""
        while True:
            newest = await self._coordinator.newer_policy.remote(self._serial)
            if newest is None:
                return
            if served_rank(self._settings.config) is not None:
                await self._take_adapter(newest)
            else:
                await self._write_weights(newest)
                path = str(self._folder / WEIGHTS_FILE)
                await self._engine.reload(path, newest["version"])
            await self._prove(newest)

    async def _write_weights(self, newest: dict[str, Any]) -> None:
        (content,) = (await newest["weights"][0]).values()
        part = f"{WEIGHTS_FILE}.part"
        await asyncio.to_thread(self._scratch.write, part, content)
        (self._folder / part).rename(self._folder / WEIGHTS_FILE)

    async def _take_adapter(self, newest: dict[str, Any]) -> None:
        """Write the adapter to a folder of its own, by which vLLM tells it from those before."""
        folder = self._folder / f"adapter-{newest['serial']}"
        folder.mkdir()
        for name, content in (await newest["weights"][0]).items():
            await asyncio.to_thread(self._scratch.write, f"{folder.name}/{name}", content)
        try:
            await self._engine.take_adapter(newest["serial"], str(folder), newest["version"])
        except Exception as error:
            if self._ending.after_error(error):
                raise
            problem = (
                f"the sampler cannot take the student's adapter of step {newest['version']} "
                f"({error}); leave policy.merge_adapters at true, which sends it merged weights"
            )
            await self._coordinator.failed.remote(problem)
            raise RunError(problem) from error

    async def _prove(self, newest: dict[str, Any]) -> None:
        """Compare the engine's logprobs of the probe with the student's; answer with it if equal.

        Raises RunError, which also ends the run, where they are not.
        """
        ids, signal = newest["probe_ids"], Signal("sampled")
        (answer,) = await self._engine.score([ids[:1]], [ids[1:]], signal, ahead=True)
        assert answer.sampled_logprobs is not None, f"the probe was not scored: {answer.error}"
        gap = float(np.abs(answer.sampled_logprobs - newest["probe_logprobs"]).mean())
        allowed = allowed_gap(self._settings.config, self._engine.dtype)
        version = newest["version"]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        write_line(f"{now} weights of step {version}: {gap:.2g} nats from the student's")
        if not gap <= allowed:  # Also of NaN.
            problem = does_not_follow(version, gap, allowed)
            await self._coordinator.failed.remote(problem)
            raise RunError(problem)
        async with self._changed:
            self._serial, self._version = newest["serial"], version
            self._changed.notify_all()
        await self._coordinator.policy_loaded.remote(self._serial, version)

    def _clean_up(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()
        if scratch := getattr(self, "_scratch", None):
            scratch.remove()


def named(answer: Answer) -> Answer:
    """The answer with its spans in ``finish_reason``, where a table has room for them."""
    if answer.finish_reason is None:
        return answer
    assert answer.spans, "the engine did not say which weights wrote an answer"
    return replace(answer, finish_reason=with_spans(answer.finish_reason, answer.spans))


def does_not_follow(version: int, gap: float, allowed: float) -> str:
    """What a sampler that does not follow its student is stopped with."""
    return (
        f"the sampler does not follow the student: with the weights of step {version} its logprobs "
        f"are {gap:.3g} nats off the student's on the probe, more than {allowed:g}; what it writes "
        "would not be the student's own; raise policy.max_logprob_gap if its precision explains "
        "the difference, or set policy.dtype: float32"
    )


def versions_in_flight(config: RunConfig) -> int:
    """Adapters of which answers may be on their way, and the newest, whose proof is not to wait."""
    policy = config.policy
    return min(MOST_ADAPTERS, 2 + policy.staleness_bound // policy.sync_every_steps)


def versions_kept(config: RunConfig) -> int:
    """Versions of which the files are there at a time: whole weights, and those that come next."""
    return 2 if served_rank(config) is None else versions_in_flight(config) + 1


def allowed_gap(config: RunConfig, dtype: str) -> float:
    """The mean difference of the probe's logprobs that is allowed, nats."""
    return config.policy.max_logprob_gap or GAPS.get(dtype, GAP_OF_OTHERS)


def engine_settings(
    settings: SamplerSettings,
    folder: Path,
    newest: dict[str, Any],
    cores: tuple[int, ...] | None,
    start: int,
) -> EngineSettings:
    """The engine of the student in ``folder``: one device, the teacher's limits.

    start: a number that no other start of a replica has; it is part of the seed.
    """
    config = settings.config
    policy, teacher = config.policy, config.teacher
    context = read_object(folder / "config.json").get("max_position_embeddings")
    limits = (teacher.max_model_len, settings.context, context)
    longest = [n for n in limits if n is not None]
    engine = TeacherConfig.model_validate(
        {
            "model": str(folder),
            "dtype": policy.dtype or config.training.export_dtype,
            "max_model_len": min(longest, default=None),
            "max_num_seqs": teacher.max_num_seqs,
            "max_num_batched_tokens": teacher.max_num_batched_tokens,
            "gpu_memory_utilization": teacher.gpu_memory_utilization,
            "kv_cache_gib": policy.kv_cache_gib or teacher.kv_cache_gib,
            "enforce_eager": teacher.enforce_eager,
            "trust_remote_code": teacher.trust_remote_code,
            "request_timeout_s": teacher.request_timeout_s,
        }
    )
    sampling = ResolvedSampling(
        temperature=policy.sampling.temperature,
        top_p=policy.sampling.top_p,
        top_k=policy.sampling.top_k,
        min_p=0.0,
        max_tokens=policy.max_tokens or teacher.sampling.max_tokens,
        stop_token_ids=tuple(newest["stop_token_ids"]),
    )
    # Another seed at each start: what was in flight before must not be drawn again, nor what
    # another replica draws.
    seed = config.section_seeds()["policy"] + start
    plain = EngineSettings(engine, str(folder), sampling, seed, max_top_k=1, cores=cores)
    return replace(plain, extension=EXTENSION)
