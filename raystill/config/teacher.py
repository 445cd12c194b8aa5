"""Configuration of the teacher: the model, its engine, its sampling, its replicas."""

from typing import Any, Literal

from pydantic import model_validator

from raystill.config.base import ConfigModel, LabelSelector, PositiveInt, identity, operational


class SamplingConfig(ConfigModel):
    """How the teacher draws its answers. Unset values come from its own generation config.

    Sampling chooses the contexts only: the signal is always of the untempered teacher.
    """

    temperature: float | None = identity(
        None, ge=0, description="Softmax temperature; 0 is greedy."
    )
    top_p: float | None = identity(None, gt=0, le=1, description="Nucleus probability mass.")
    top_k: int | None = identity(None, ge=0, description="Draw among this many best ids; 0 is all.")
    min_p: float | None = identity(
        None, ge=0, le=1, description="Least probability relative to the best id's."
    )
    max_tokens: PositiveInt = identity(512, description="Longest answer, in tokens.")
    stop_token_ids: tuple[int, ...] | None = identity(
        None, description="Ids that end an answer; default: the model's own eos ids."
    )


class SyntheticConfig(ConfigModel):
    """The engine without a model: deterministic answers, for fault tests and stream benchmarks."""

    vocab_size: PositiveInt = identity(1024, description="Number of ids answers are drawn from.")
    response_tokens: PositiveInt = identity(16, description="Length of every answer, in tokens.")
    delay_s: float = operational(0.0, ge=0, description="Time one group takes, in seconds.")
    poison_token: int | None = identity(
        None, ge=0, description="A prompt that holds this id ends its replica's process."
    )


class ReplicasConfig(ConfigModel):
    """Bounds between which Ray Serve scales the teacher by what the student can eat."""

    min: int = operational(1, ge=0, description="Fewest replicas; 0 lets an idle teacher go.")
    max: PositiveInt = operational(1, description="Most replicas.")
    upscale_delay_s: float = operational(
        10.0, ge=0, description="Seconds the student waits for rows before replicas are added."
    )
    downscale_delay_s: float = operational(
        120.0, ge=0, description="Seconds rows wait for the student before replicas are drained."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasConfig":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max}); swap them")
        return self


class TeacherConfig(ConfigModel):
    """The model learned from, and the engine that runs it."""

    model: str = identity(description="Local folder or Hugging Face id of the teacher.")
    revision: str | None = identity(None, description="Hub revision (branch, tag or commit).")
    engine: Literal["vllm", "synthetic"] = identity(
        "vllm", description="vllm runs the model; synthetic is a deterministic stand-in for tests."
    )
    trust_remote_code: bool = identity(False, description="Run code that comes with the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = identity(
        "auto", description="Precision of the engine's weights and activations."
    )
    quantization: str | None = identity(None, description="vLLM quantisation method, e.g. fp8.")
    max_model_len: PositiveInt | None = operational(
        None, description="Longest prompt plus answer, in tokens; default: the model's own limit."
    )
    tensor_parallel_size: PositiveInt = operational(1, description="GPUs that share each layer.")
    pipeline_parallel_size: PositiveInt = operational(1, description="GPUs the layers spread over.")
    gpu_memory_utilization: float = operational(
        0.9, gt=0, le=1, description="Share of the GPU's memory the engine may take."
    )
    kv_cache_gib: float | None = operational(
        None, gt=0, description="Size of the key-value cache, GiB; default on a CPU: 2."
    )
    max_num_seqs: PositiveInt = operational(64, description="Rows one engine decodes at a time.")
    max_num_batched_tokens: PositiveInt | None = operational(
        None, description="Tokens one engine step may take; default: vLLM's own."
    )
    enforce_eager: bool | None = operational(
        None, description="Skip graph capture: starts faster, runs slower; default: on a CPU only."
    )
    seed: int | None = operational(None, ge=0, description="Engine seed; default: from the root.")
    engine_args: dict[str, Any] = operational(
        {}, description="Further vLLM engine arguments by their own names; checked against vLLM's."
    )
    sampling: SamplingConfig = identity(SamplingConfig(), description="How answers are drawn.")
    synthetic: SyntheticConfig = identity(
        SyntheticConfig(), description="Settings of the synthetic engine."
    )
    num_replicas: PositiveInt | ReplicasConfig = operational(
        1, description="A fixed number of replicas, or {min, max} to scale between by themselves."
    )
    target_ongoing_requests: PositiveInt = operational(
        8, description="Groups one replica works on at a time; also the autoscaler's target."
    )
    cpu_cores: tuple[int, ...] | None = operational(
        None,
        description="Cores of the engine on a CPU node; default: the first half of the node's.",
    )
    resources_per_replica: dict[str, float] = operational(
        {}, description="Custom Ray resources a replica asks for, e.g. {teacher: 1}."
    )
    gpus_per_replica: float | None = operational(
        None,
        ge=0,
        description="GPUs of one replica: 0, a share of one below 1 (beside a student on a small "
        "machine), or all of its parallel ranks; default: these where the cluster has GPUs.",
    )
    accelerator_type: str | None = operational(None, description="Ray accelerator type, e.g. H100.")
    label_selector: LabelSelector = operational(
        {}, description="Labels of the nodes that replicas may run on, e.g. {role: teacher}."
    )
    request_timeout_s: float = operational(
        600.0,
        gt=0,
        description="Longest time a replica may take for one group's answers, seconds.",
    )
    startup_timeout_s: float = operational(
        1800.0, gt=0, description="Longest wait for the first replica, seconds."
    )

    @model_validator(mode="after")
    def _gpus_fit(self) -> "TeacherConfig":
        gpus, ranks = self.gpus_per_replica, self.tensor_parallel_size * self.pipeline_parallel_size
        if gpus is None or gpus == 0:
            return self
        if 0 < gpus < 1 and ranks == 1:
            if self.gpu_memory_utilization > gpus:
                raise ValueError(
                    f"gpu_memory_utilization ({self.gpu_memory_utilization:g}) is more than "
                    f"gpus_per_replica ({gpus:g}), so that what shares the GPU would find no "
                    f"memory; set gpu_memory_utilization to {gpus:g} or less"
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
