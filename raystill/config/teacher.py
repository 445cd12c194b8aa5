"""Configuration of the teacher: the model, its engine, its sampling, its replicas."""

import math
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, Literal

from pydantic import model_validator

from raystill.config.base import (
    ApiConfig,
    ConfigModel,
    Cores,
    LabelSelector,
    PositiveInt,
    Resources,
    identity,
    operational,
)


class SamplingConfig(ConfigModel):
    """How the teacher samples its answers. Unset values come from its own generation config.

    Sampling decides which tokens an answer has. The signal of these tokens is always the teacher's
    distribution at temperature 1, before any of these filters.
    """

    temperature: float | None = identity(
        None,
        ge=0,
        le=100,
        description="Softmax temperature of sampling; 0 is greedy decoding. Default: the model's "
        "generation_config.json, else 1.",
    )
    top_p: float | None = identity(
        None,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the most probable ids whose probabilities reach "
        "this sum. Default: the model's generation_config.json, else 1 (all ids).",
    )
    top_k: int | None = identity(
        None,
        ge=0,
        description="Sample from this many most probable ids; 0 is all. Default: the model's "
        "generation_config.json, else 0.",
    )
    min_p: float | None = identity(
        None,
        ge=0,
        le=1,
        description="Leave out ids less probable than this share of the most probable id's "
        "probability. Default: the model's generation_config.json, else 0.",
    )
    max_tokens: PositiveInt = identity(
        512, description="Longest answer, in tokens; a longer one is cut off."
    )
    stop_token_ids: tuple[int, ...] | None = identity(
        None,
        description="Token ids that end an answer. Default: the end-of-sequence ids of the model "
        "and its tokenizer.",
    )


class SyntheticConfig(ConfigModel):
    """The synthetic engine: deterministic answers without a model, for tests and benchmarks."""

    vocab_size: PositiveInt = identity(
        1024, description="Vocabulary size: the number of token ids that answers are made of."
    )
    response_tokens: PositiveInt = identity(16, description="Length of every answer, in tokens.")
    delay_s: float = operational(
        0.0, ge=0, description="Time that the engine takes for one group of rows, in seconds."
    )
    poison_token: int | None = identity(
        None,
        ge=0,
        description="Token id that ends the replica's process when a prompt contains it. Default: "
        "none.",
    )


class ReplicasConfig(ConfigModel):
    """Bounds between which Ray Serve scales the teacher, to as many as keep the student busy; or
    the student's sampler, by what waits for it.
    """

    min: int = operational(
        1,
        ge=0,
        description="Fewest replicas. 0: the teacher is shut down while no answers are needed; of "
        "a sampler 1 is the least.",
    )
    max: PositiveInt = operational(1, description="Most replicas.")
    upscale_delay_s: float = operational(
        10.0,
        ge=0,
        description="Seconds for which the student must wait for rows before replicas are added.",
    )
    downscale_delay_s: float = operational(
        120.0,
        ge=0,
        description="Seconds for which rows must wait for the student before replicas are removed.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasConfig":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max}); swap them")
        return self


class TeacherConfig(ConfigModel):
    """The teacher: its model, the engine that runs it, and its replicas."""

    model: str = identity(description="Local folder or Hugging Face id of the teacher.")
    revision: str | None = identity(
        None, description="Branch, tag or commit of the model on the Hub. Default: its main branch."
    )
    engine: Literal["vllm", "api", "synthetic"] = identity(
        "vllm",
        description="Engine that gives the answers. vllm: runs the model. api: asks the service in "
        "teacher.api; model then names the folder or Hub id whose tokenizer and chat template the "
        "student uses. synthetic: deterministic answers without a model, for tests.",
    )
    trust_remote_code: bool = identity(
        False, description="Whether to run Python code that comes with the model."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = identity(
        "auto",
        description="Precision of the engine's weights and activations. auto: as vLLM chooses from "
        "the model's config.json.",
    )
    quantization: str | None = identity(
        None,
        description="vLLM's quantization method, e.g. fp8. Default: what the model's config.json "
        "says.",
    )
    max_model_len: PositiveInt | None = operational(
        None,
        description="Longest prompt and answer together, in tokens. Default: the model's own "
        "context length.",
    )
    tensor_parallel_size: PositiveInt = operational(
        1, description="Tensor parallelism: number of GPUs over which each layer is split."
    )
    pipeline_parallel_size: PositiveInt = operational(
        1, description="Pipeline parallelism: number of stages that the layers are divided into."
    )
    gpu_memory_utilization: float = operational(
        0.9, gt=0, le=1, description="Share of a GPU's memory that the engine may use."
    )
    kv_cache_gib: float | None = operational(
        None,
        gt=0,
        description="Size of the key-value cache, in GiB. Default: 2 on a CPU; on a GPU, what "
        "gpu_memory_utilization leaves beside the weights.",
    )
    max_num_seqs: PositiveInt = operational(
        64, description="Most rows that one engine decodes at a time."
    )
    max_num_batched_tokens: PositiveInt | None = operational(
        None, description="Most tokens that one engine step processes. Default: vLLM's choice."
    )
    enforce_eager: bool | None = operational(
        None,
        description="Whether to skip CUDA graphs and compilation: the engine starts faster and "
        "runs slower. Default: true on a CPU, false on a GPU.",
    )
    seed: int | None = operational(
        None, ge=0, description="Random seed of the engine. Default: derived from the run's seed."
    )
    engine_args: dict[str, Any] = operational(
        {},
        description="Further arguments of vLLM's engine, by vLLM's own names. Unknown names are "
        "refused. Those that may change answers are part of the stored answers' keys.",
    )
    sampling: SamplingConfig = identity(
        SamplingConfig(), description="How the teacher samples its answers."
    )
    synthetic: SyntheticConfig = identity(
        SyntheticConfig(), description="Settings of the synthetic engine."
    )
    api: ApiConfig = identity(ApiConfig(), description="Settings of the engine api.")
    num_replicas: PositiveInt | ReplicasConfig = operational(
        1,
        description="Number of replicas of the teacher; {min, max} for autoscaling between these "
        "bounds.",
    )
    target_ongoing_requests: PositiveInt | None = operational(
        None,
        description="Groups that one replica works on at a time; also Ray Serve's autoscaling "
        "target. Default: as many as hold six rows for each of the engine's slots (max_num_seqs; "
        "with engine: api, api.max_concurrency), so that a slot does not wait for the slowest row "
        "of its group; one row a slot with signal.kind: hidden, whose states are kept until their "
        "group ends; fewer where stream.max_rows_ahead has no room for them.",
    )
    cpu_cores: Cores | None = operational(
        None,
        description="Ids of the CPU cores for the teacher's replicas, on a node without GPUs. "
        "Default: the first half of the node's cores.",
    )
    resources_per_replica: Resources = operational(
        {}, description="Custom Ray resources that a replica requests, e.g. {teacher: 1}."
    )
    gpus_per_replica: float | None = operational(
        None,
        ge=0,
        description="GPUs of one replica: 0, a share below 1 of one GPU that it shares with a "
        "student, or one for each parallel rank. Default: one for each rank if the cluster has "
        "GPUs, else 0.",
    )
    accelerator_type: str | None = operational(
        None, description="Ray's name of the GPU type to run on, e.g. H100. Default: any."
    )
    label_selector: LabelSelector = operational(
        {}, description="Ray node labels that a replica's node must have, e.g. {role: teacher}."
    )
    request_timeout_s: float | None = operational(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest time, in seconds, that the engine may take for one row. One that "
        "takes longer is dropped as timed_out, and asked again at the next start or epoch. null: "
        "it is waited for. With engine: api, of one request.",
    )
    startup_timeout_s: float = operational(
        1800.0, gt=0, description="Longest time, in seconds, until the first replica is ready."
    )

    @model_validator(mode="after")
    def _api_is_named(self) -> "TeacherConfig":
        if self.engine == "api":
            missing = [name for name in ("base_url", "model") if getattr(self.api, name) is None]
            if missing:
                raise ValueError(
                    f"engine is 'api' but {', '.join(f'api.{name}' for name in missing)} is unset; "
                    "name the service and its model"
                )
            if self.num_replicas != 1:
                raise ValueError(
                    "engine is 'api', whose limits are kept by one replica; set num_replicas: 1, "
                    "and api.max_concurrency for more requests at a time"
                )
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> "TeacherConfig":
        gpus, ranks = self.gpus_per_replica, self.tensor_parallel_size * self.pipeline_parallel_size
        if gpus is None or gpus == 0:
            return self
        if 0 < gpus < 1 and ranks == 1:
            if self.gpu_memory_utilization > gpus:
                raise ValueError(
                    f"gpu_memory_utilization ({self.gpu_memory_utilization:g}) is more than "
                    f"gpus_per_replica ({gpus:g}), which leaves too little memory for what shares "
                    f"the GPU; set gpu_memory_utilization to {gpus:g} or less"
                )
            return self
        if gpus != ranks:
            raise ValueError(
                f"gpus_per_replica is {gpus:g}, but tensor_parallel_size x pipeline_parallel_size "
                f"is {ranks}, and each rank needs a GPU of its own; set gpus_per_replica to {ranks}"
                + (", or to a share below 1" if ranks == 1 else "")
            )
        return self

    @property
    def max_replicas(self) -> int:
        """The largest number of replicas this configuration may run."""
        n = self.num_replicas
        return n if isinstance(n, int) else n.max

    @property
    def gives_text_only(self) -> bool:
        """Whether there is no more to be had than the answers' text."""
        return not self.scores and self.api.top_logprobs is None

    @property
    def scores(self) -> bool:
        """Whether it tells the probabilities of a response that it did not write."""
        return self.engine != "api" or self.api.ids

    @property
    def slots(self) -> int:
        """Rows that one engine answers at a time; all others of its groups wait in the replica."""
        if self.engine != "api":
            return self.max_num_seqs
        # Six rows are asked for each slot: a batch's rows in all.
        batch = self.api.batch
        return self.api.max_concurrency if batch is None else math.ceil(batch.max_rows / 6)


Teachers = dict[str, TeacherConfig] | None
"""Several teachers by name; None where there is one."""


class JudgeConfig(ConfigModel):
    """Rejects answers to which another teacher gives a low score, by a rubric in words.

    The score is the expected value of its verdict, by the probabilities of the first token of its
    reply; of a service that has no probabilities, the value of the word it replies with. A reply is
    stored like every answer, so that the same question is asked once.
    """

    teacher: str = identity(description="Name of the judge, one of teachers.")
    rubric: str = identity(
        min_length=1, description="What the judge is told to look at, before request and answer."
    )
    verdicts: dict[str, float] = identity(
        {"yes": 1.0, "no": 0.0},
        min_length=2,
        description="Words that the judge may reply with, and the score of each, for example "
        "{'1': 0, '2': 0.25, '3': 0.5, '4': 0.75, '5': 1}.",
    )
    columns: tuple[str, ...] = identity(
        (),
        description="Fields of the prompt files that the judge reads too, a reference for instance "
        "(null where a row has none).",
    )
    min_score: float = identity(0.5, description="Least score of an answer that passes.")
    min_verdict_share: float = identity(
        0.1,
        gt=0,
        le=1,
        description="Least probability of all verdict words together; with less the judge has "
        "said something else, and the answer is rejected. Not for a service without probabilities.",
    )

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> "JudgeConfig":
        words = [word.casefold() for word in self.verdicts]
        if len(set(words)) < len(words) or not all(re.fullmatch(r"\w+", word) for word in words):
            raise ValueError(
                f"verdicts are {', '.join(map(repr, self.verdicts))}; expected single words that "
                "differ in more than upper and lower case"
            )
        least, most = min(self.verdicts.values()), max(self.verdicts.values())
        if least == most:
            raise ValueError(f"verdicts all have the score {most:g}, which tells nothing apart")
        if self.min_score > most:
            raise ValueError(
                f"min_score ({self.min_score:g}) is above every verdict (at most {most:g}), which "
                "rejects every answer; lower it"
            )
        return self


def section_of(name: str) -> str:
    """The section of the run file that sets a teacher; name: among several, else ""."""
    return f"teachers.{name}" if name else "teacher"


def who_is(name: str) -> str:
    """What messages call a teacher; name: as for `section_of`."""
    return f"the teacher {name}" if name else "the teacher"


MOST_TEACHERS = 100


def require_names(teachers: Mapping[str, TeacherConfig] | None) -> None:
    """ValueError where there is no teacher, or a name that would be none for its files."""
    if teachers is not None and not teachers:
        raise ValueError("is empty; name one or more teachers, or set teacher")
    if len(teachers or ()) > MOST_TEACHERS:
        many = f"names {len(teachers or ()):,} teachers"
        raise ValueError(f"{many}; expected at most {MOST_TEACHERS}, each of which is checked")
    wrong = [name for name in teachers or () if not re.fullmatch("[a-z][a-z0-9_]{0,30}", name)]
    if wrong:
        raise ValueError(
            f"names a teacher {wrong[0]!r}; expected small letters, digits and _, 31 at most, with "
            "a letter first"
        )


def wrong_judges(
    teachers: Mapping[str, TeacherConfig] | None, judges: Set[str], only_judges: Set[str]
) -> Iterator[str]:
    """Judges that cannot judge, each with its remedy; only_judges: those that answer no row."""
    known = teachers or {}
    for name in sorted(judges):
        if name not in known:
            yield (
                f"filters: the judge {name!r} is none of teachers "
                f"({', '.join(known) or 'which is unset'}); name it there"
            )
        elif known[name].engine == "api" and known[name].api.batch is not None:
            yield (
                f"filters: the judge {name!r} works in batches, but its verdicts are waited for; "
                f"remove teachers.{name}.api.batch"
            )
    first = next(iter(known), None)
    if first in only_judges:
        yield (
            f"teachers: the first one ({first}) answers no row, but its tokenizer is to be the "
            "student's; list one that answers rows first"
        )
