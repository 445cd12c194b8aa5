"""Configuration of training: steps, optimizer, workers, precision, memory, checkpoints; and of
where the run and the student go.
"""

import re
from typing import Literal

from pydantic import field_validator, model_validator

from raystill.config.base import (
    ConfigModel,
    Cores,
    LabelSelector,
    PositiveInt,
    Resources,
    identity,
    operational,
)

SHARDED_ONLY = ("shard_group_size", "reduce_gradients", "cpu_offload")


class TrainingConfig(ConfigModel):
    """Training of the student: steps, optimizer, workers, precision, memory and checkpoints."""

    epochs: PositiveInt = operational(1, description="Number of passes over all rows.")
    rows_per_step: PositiveInt = identity(
        32, description="Rows of one optimizer step, all workers together (global batch size)."
    )
    max_failures: int = operational(
        3,
        ge=0,
        description="How often the workers are restarted from the last checkpoint after one of "
        "them has died.",
    )
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = operational(
        1,
        description="Number of student worker processes. [min, max]: as many within these bounds "
        "as the cluster has room for; their number follows as nodes join and leave.",
    )
    resize_every_s: float = operational(
        60.0,
        gt=0,
        description="With num_workers [min, max]: seconds between checks for room for more "
        "workers. To add some, the workers are restarted from the last checkpoint.",
    )
    startup_timeout_s: float = operational(
        1800.0,
        gt=0,
        description="Longest time, in seconds, to wait for resources for the workers: at the "
        "start, and after nodes were lost.",
    )
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit"] = identity(
        "adamw",
        description="AdamW, and how its state is kept; bytes a parameter with weights and "
        "gradients. adamw: 16, moments in param_dtype. adamw_8bit: 10.1, moments of matrices in 8 "
        "bits. adamw_bf16: 10, weights, gradients and moments in bfloat16, with what rounding "
        "takes from a weight kept in 2 more bytes (Kahan).",
    )
    # The three numbers of the learning rate may change on resume: lowering them is the remedy of a
    # loss that is not finite. Each line of metrics.jsonl has the rate of its step.
    learning_rate: float = operational(1e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = identity(
        "cosine",
        description="Learning rate after the warm-up. cosine: falls to min_learning_rate_ratio of "
        "the peak at the last step. constant: stays at the peak.",
    )
    warmup_steps: int = operational(
        0, ge=0, description="Optimizer steps of linear warm-up of the learning rate."
    )
    min_learning_rate_ratio: float = operational(
        0.1,
        ge=0,
        le=1,
        description="Learning rate at the end of the cosine schedule, as a share of the peak.",
    )
    weight_decay: float = identity(
        0.0, ge=0, description="Weight decay of AdamW; applied to matrices only."
    )
    beta1: float = identity(
        0.9, ge=0, lt=1, description="AdamW's beta1, the decay rate of the first moment."
    )
    beta2: float = identity(
        0.95, ge=0, lt=1, description="AdamW's beta2, the decay rate of the second moment."
    )
    epsilon: float = identity(
        1e-8, gt=0, description="AdamW's epsilon, added to the denominator of an update."
    )
    max_grad_norm: float | None = identity(
        1.0, gt=0, description="Global gradient norm above which gradients are clipped. null: off."
    )
    skip_non_finite: int = operational(
        0,
        ge=0,
        description="Most steps of the run that are skipped because their loss or gradient norm is "
        "not finite. A skipped step leaves the student as it is, and its rows are not asked for "
        "again. One more ends the run.",
    )
    normalise: Literal["token", "row"] = identity(
        "token",
        description="What the loss is a mean over. token: every response token has the same "
        "weight. row: every row has the same weight, shared by its response tokens.",
    )
    tokens_per_micro_batch: PositiveInt = operational(
        4096,
        description="Most tokens of one forward pass, prompts, responses and padding together. It "
        "bounds the memory; a step runs as many passes as it needs.",
    )
    packing: bool | Literal["auto"] = operational(
        "auto",
        description="Whether the rows of a forward pass are joined into one sequence instead of "
        "padded; no row attends to another. auto: if the attention is FlashAttention, "
        "flex_attention, or on a CPU sdpa row by row.",
    )
    attention: Literal[
        "auto", "flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager"
    ] = operational(
        "auto",
        description="Attention implementation of the student. auto: FlashAttention if it is "
        "installed and supports the student and its GPU, else sdpa, on a CPU row by row; for "
        "models that cap attention logits or have sinks flex_attention on GPUs, and eager on CPUs.",
    )
    param_dtype: Literal["float32", "float64"] = identity(
        "float32",
        description="Precision of parameters, optimizer state and gradient reduction; see also "
        "optimizer.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = identity(
        "auto",
        description="Precision of matrix products. auto: bfloat16 on GPUs and on CPUs "
        "with AMX or AVX512-BF16, else float32.",
    )
    residual_dtype: Literal["auto", "float32", "bfloat16"] = identity(
        "auto",
        description="Precision of what goes from layer to layer, with weights in float32. "
        "bfloat16: needs half the memory, with products in bfloat16; weights, optimizer and sums "
        "over workers stay in float32. auto: bfloat16 with strategy fsdp and several workers, else "
        "float32.",
    )
    strategy: Literal["ddp", "fsdp"] = operational(
        "ddp",
        description="How the student is distributed over the workers. ddp: each worker has a whole "
        "copy. fsdp: parameters, gradients and optimizer state are sharded (FSDP2); all parameters "
        "are gathered at once only for the student's own answers, if there is room.",
    )
    shard_group_size: PositiveInt | None = operational(
        None,
        description="With strategy fsdp: number of workers that share one copy of the student; "
        "such groups hold a copy each (HSDP). It must divide num_workers. Default: all workers.",
    )
    reduce_gradients: Literal["each_pass", "once"] = operational(
        "each_pass",
        description="With strategy fsdp: when the workers add up their gradients. each_pass: after "
        "every forward and backward pass. once: after the last of a step, which sends less and "
        "needs memory for the whole gradient on every worker.",
    )
    cpu_offload: bool = operational(
        False,
        description="With strategy fsdp: whether weights, gradients and optimizer state are kept "
        "in host memory, where the optimizer's step is computed too; saves the GPU's memory and "
        "takes time.",
    )
    activation_checkpointing: bool = operational(
        False,
        description="Whether to recompute each layer's activations in the backward pass, which "
        "saves memory and takes time.",
    )
    compile: bool = operational(
        False, description="Whether to compile the student with torch.compile."
    )
    checkpoint_every_steps: int = operational(
        100,
        ge=0,
        description="Optimizer steps between checkpoints. 0: only when the run is stopped and at "
        "its end.",
    )
    num_checkpoints_to_keep: PositiveInt = operational(
        2, description="Number of newest checkpoints to keep; older ones are deleted."
    )
    export_dtype: Literal["bfloat16", "float16", "float32"] = operational(
        "bfloat16", description="Precision of the finished model in the run folder's student/."
    )
    gpus_per_worker: float | None = operational(
        None,
        ge=0,
        description="GPUs of one worker; a share below 1 for a GPU that it shares. Default: 1 if "
        "the cluster has GPUs, else 0.",
    )
    cpus_per_worker: float = operational(
        1.0, gt=0, description="CPUs that one worker requests from Ray."
    )
    cpu_cores: Cores | Literal["all"] | None = operational(
        None,
        description="Ids of the CPU cores for the workers, on a node without GPUs. all: every "
        "core, for a run that has all answers in the store. Default: the second half of the "
        "node's cores.",
    )
    idle_teacher_cores: bool = operational(
        True,
        description="On nodes without GPUs, unless cpu_cores is set: whether the workers take "
        "over the teacher's cores while no teacher is served, and give them back when it is "
        "wanted. Sums of more threads may differ in their last bits.",
    )
    resources_per_worker: Resources = operational(
        {}, description="Custom Ray resources that a worker requests, e.g. {student: 1}."
    )
    accelerator_type: str | None = operational(
        None, description="Ray's name of the GPU type to run on, e.g. H100. Default: any."
    )
    label_selector: LabelSelector = operational(
        {}, description="Ray node labels that a worker's node must have, e.g. {role: student}."
    )

    @model_validator(mode="after")
    def _precision_of_attention(self) -> "TrainingConfig":
        precision = self.compute_dtype if self.param_dtype == "float32" else self.param_dtype
        if self.attention.startswith("flash") and precision in ("float32", "float64"):
            raise ValueError(
                f"attention is {self.attention}, which computes in bfloat16, but matrix products "
                f"are in {precision}; set compute_dtype: bfloat16, or attention: auto"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> "TrainingConfig":
        if self.optimizer != "adamw" and self.param_dtype != "float32":
            raise ValueError(
                f"optimizer is {self.optimizer}, but param_dtype is {self.param_dtype}; leave "
                "param_dtype unset, or set optimizer: adamw"
            )
        if self.optimizer == "adamw_bf16" and self.compute_dtype == "float32":
            raise ValueError(
                "optimizer is adamw_bf16, whose weights are in bfloat16, but compute_dtype is "
                "float32; set compute_dtype: bfloat16 or auto, or optimizer: adamw_8bit"
            )
        if self.optimizer == "adamw_bf16" and self.beta2 > 0.99:
            raise ValueError(
                f"optimizer is adamw_bf16, in which a second moment of beta2 {self.beta2:g} would "
                "never fall: bfloat16 rounds what a step takes from it away; set beta2: 0.99 or "
                "less, or optimizer: adamw_8bit"
            )
        return self

    @model_validator(mode="after")
    def _residual_fits(self) -> "TrainingConfig":
        if self.residual_dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError(
                "residual_dtype is bfloat16, but compute_dtype is float32; set compute_dtype: "
                "bfloat16 or auto, or residual_dtype: auto"
            )
        if self.residual_dtype != "auto" and self.weights_dtype != "float32":
            raise ValueError(
                f"residual_dtype is {self.residual_dtype}, but weights are in "
                f"{self.weights_dtype}, and what goes from layer to layer with them; leave "
                "residual_dtype unset"
            )
        return self

    @model_validator(mode="after")
    def _sharding_fits(self) -> "TrainingConfig":
        group, defaults = self.shard_group_size, (None, "each_pass", False)
        for name, value in zip(SHARDED_ONLY, defaults, strict=True):
            if self.strategy != "fsdp" and getattr(self, name) != value:
                raise ValueError(f"{name} is set, which only shards have; set strategy: fsdp")
        if group is not None and (self.min_workers != self.max_workers or self.max_workers % group):
            raise ValueError(
                f"shard_group_size is {group}, which does not divide num_workers "
                f"({self.num_workers}); set num_workers to one number, and a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _bounds_of_workers(self) -> "TrainingConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"num_workers is {list(self._worker_bounds)}, expected [min, max]; "
                f"set it to [{self.max_workers}, {self.min_workers}]"
            )
        return self

    @property
    def weights_dtype(self) -> str:
        """The dtype in which the weights are trained."""
        return "bfloat16" if self.optimizer == "adamw_bf16" else self.param_dtype

    def narrow_residual(self, workers: int) -> bool:
        """Whether what goes from layer to layer is in the precision of products, where that is
        narrower than the weights'.
        """
        if self.residual_dtype == "auto":
            return self.strategy == "fsdp" and workers > 1
        return self.residual_dtype == "bfloat16"

    @property
    def _worker_bounds(self) -> tuple[int, int]:
        n = self.num_workers
        return (n, n) if isinstance(n, int) else n

    @property
    def min_workers(self) -> int:
        """Fewest workers with which the run starts and goes on."""
        return self._worker_bounds[0]

    @property
    def max_workers(self) -> int:
        """Most workers that the run has at a time."""
        return self._worker_bounds[1]


class WandbConfig(ConfigModel):
    """Weights & Biases. Its key is taken from WANDB_API_KEY or ``wandb login``, never from here."""

    project: str = operational("raystill", min_length=1, description="Name of the project.")
    entity: str | None = operational(
        None, description="User or team that has the project. Default: the key's own."
    )
    mode: Literal["online", "offline"] = operational(
        "online",
        description="offline writes into logs/wandb of the run folder; 'wandb sync' sends it.",
    )


class MlflowConfig(ConfigModel):
    """MLflow. Its credentials are taken from its own environment variables, never from here."""

    tracking_uri: str | None = operational(
        None,
        description="A server or a database, e.g. sqlite:////home/me/mlflow.db. Default: "
        "MLFLOW_TRACKING_URI.",
    )
    experiment: str = operational("raystill", min_length=1, description="Name of the experiment.")


class TrackioConfig(ConfigModel):
    """Trackio. It writes into TRACKIO_DIR, or to the Space that TRACKIO_SPACE_ID names."""

    project: str = operational("raystill", min_length=1, description="Name of the project.")


class StoreConfig(ConfigModel):
    """The teacher store, which keeps answers for later epochs, runs and students."""

    path: str | None = operational(
        None,
        description="Folder or URI of the teacher store. Default: teacher_store beside the run "
        "folder; runs in the same parent folder share it.",
    )


class HubConfig(ConfigModel):
    """The Hugging Face Hub. Its token is from HF_TOKEN or ``hf auth login``, never from here."""

    repo: str = operational(description="Repository, as owner/name; it is created if need be.")
    private: bool = operational(
        True,
        description="Whether the repository is private. false: everybody may read it, which needs "
        "terms.distributed: true.",
    )

    @field_validator("repo")
    @classmethod
    def _is_a_name(cls, repo: str) -> str:
        word = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
        if (
            not re.fullmatch(f"{word}/{word}", repo)
            or "--" in repo
            or ".." in repo
            or repo.endswith(".git")
        ):
            raise ValueError(f"is {repo!r}; expected owner/name of letters, digits, '-', '_', '.'")
        return repo


class OutputConfig(ConfigModel):
    """Settings of the run folder."""

    path: str | None = operational(
        None,
        description="Path or URI of the run folder. Default: runs/<name of the run file>.",
    )
    tensorboard: bool = operational(
        False,
        description="Whether to write the figures for TensorBoard too, into logs/tensorboard of "
        "the run folder.",
    )
    wandb: WandbConfig | None = operational(
        None, description="Send the run to Weights & Biases too (extra wandb). Default: off."
    )
    mlflow: MlflowConfig | None = operational(
        None, description="Send the run to MLflow too (extra mlflow). Default: off."
    )
    trackio: TrackioConfig | None = operational(
        None, description="Send the run to Trackio too (extra trackio). Default: off."
    )
    hub: HubConfig | None = operational(
        None, description="Push the finished student to the Hugging Face Hub. Default: off."
    )
