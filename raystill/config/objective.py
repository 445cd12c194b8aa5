"""Configuration of the signal and of the objective: what the teacher gives, and the loss that the
student minimises against it, with its token weights.

The divergences are taken over the outcomes that the signal tells apart: with ``signal.kind: topk``
the K ids and a tail that stands for all others, with ``hidden`` the whole vocabulary. All are in
nats.
"""

from typing import Literal

from pydantic import ConfigDict, model_validator

from raystill.config.base import (
    ConfigModel,
    LabelSelector,
    PositiveInt,
    Resources,
    identity,
    operational,
)
from raystill.config.teacher import ReplicasConfig


class SignalConfig(ConfigModel):
    """The signal: what the teacher gives for each response token."""

    kind: Literal["text", "sampled", "topk", "hidden"] = identity(
        "topk",
        description="What the teacher gives for each response token. text: the token id only. "
        "sampled: also the logprob of that id. topk: the top_k most probable ids with logprobs, "
        "and the probability of all others together (the tail). hidden: the last hidden state, "
        "from which the student's workers compute the teacher's whole distribution.",
    )
    top_k: PositiveInt = identity(
        64, description="Number K of ids and logprobs for each token. Used with kind topk only."
    )


TERMS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "acceptance",
    "cross_entropy",
)
"""Names of the terms whose weighted sum is the objective."""


class TokenWeightsConfig(ConfigModel):
    """Weights of response tokens. A step's loss is a weighted mean over its tokens."""

    truncated_rows: float = identity(
        1.0,
        ge=0,
        le=100,
        description="Weight of the tokens in rows whose answer was cut off by max_tokens; other "
        "rows have weight 1.",
    )
    by: Literal["none", "entropy", "confidence"] = identity(
        "none",
        description="How a row's weight is shared among its tokens; the row's sum stays the same. "
        "none: equally. entropy: in proportion to the teacher's entropy at the token; with kind "
        "topk or sampled that is the entropy over the kept ids and the tail, a lower bound. "
        "confidence: in proportion to the probability of the teacher's most probable id; with kind "
        "sampled, of the drawn id. With kind hidden, entropy and confidence compute the teacher's "
        "logits once more.",
    )


class ObjectiveConfig(ConfigModel):
    """The objective: a weighted sum of terms. A term with weight 0 is not computed."""

    forward_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(teacher || student), over the ids of the signal and their tail.",
    )
    reverse_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(student || teacher), over the ids of the signal and their tail.",
    )
    jsd: float = identity(
        0.0,
        ge=0,
        description="Weight of the generalised Jensen-Shannon divergence: jsd_beta * KL(teacher || "
        "mixture) + (1 - jsd_beta) * KL(student || mixture), where mixture = jsd_beta * teacher + "
        "(1 - jsd_beta) * student.",
    )
    jsd_beta: float = identity(
        0.5,
        gt=0,
        lt=1,
        description="Share of the teacher in the mixture of jsd. 0 and 1 are not allowed: there "
        "jsd is 0; use forward_kl or reverse_kl instead.",
    )
    skew_forward_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of the skew KL divergence KL(teacher || skew_alpha * teacher + (1 - "
        "skew_alpha) * student).",
    )
    skew_reverse_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of the skew KL divergence KL(student || skew_alpha * student + (1 - "
        "skew_alpha) * teacher).",
    )
    skew_alpha: float = identity(
        0.1,
        gt=0,
        lt=1,
        description="Share of the first distribution that a skew KL divergence mixes into the "
        "second. 0 and 1 are not allowed: 0 is plain forward_kl or reverse_kl, and at 1 the "
        "divergence is always 0.",
    )
    total_variation: float = identity(
        0.0,
        ge=0,
        description="Weight of the total variation distance, half the sum of |teacher - student|. "
        "It equals 1 - the acceptance rate of speculative decoding.",
    )
    acceptance: float = identity(
        0.0,
        ge=0,
        description="Weight of the negative logarithm of the acceptance rate of speculative "
        "decoding with the student as the draft model: -log of the sum of min(teacher, student). "
        "Unlike total_variation, its gradient does not vanish while the rate is low.",
    )
    cross_entropy: float = identity(
        0.0,
        ge=0,
        description="Weight of the cross entropy on the response's token ids, which needs no "
        "teacher probabilities.",
    )

    router_balance: float = identity(
        0.0,
        ge=0,
        description="Weight of the load-balancing loss of a mixture-of-experts student, over each "
        "forward pass, in proportion to its tokens. Families are trained with 0.001 to 0.02.",
    )

    temperature: float = identity(
        1.0,
        gt=0,
        le=100,
        description="Divides the logits of teacher and student in every divergence; cross_entropy "
        "is not changed. A value other than 1 needs signal.kind: hidden.",
    )
    temperature_squared: bool = identity(
        False,
        description="Multiply divergences by temperature squared, so that the size of their "
        "gradients does not depend on it (Hinton et al., 2015).",
    )

    token_weights: TokenWeightsConfig = identity(
        TokenWeightsConfig(), description="Weights of the response tokens in the loss."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveConfig":
        if not self.weights:
            *others, last = TERMS
            raise ValueError(
                f"every weight is 0; give {', '.join(others)} or {last} a weight above 0"
            )
        if self.temperature != 1.0 and not self.divergences:
            raise ValueError(
                f"temperature is {self.temperature:g}, which changes divergences only, but only "
                "cross_entropy has a weight; set temperature: 1, or give a divergence a weight"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weights above zero, by the term's name."""
        return {name: weight for name in TERMS if (weight := getattr(self, name)) > 0}

    @property
    def factors(self) -> dict[str, float]:
        """Factor of each term in use: its weight, times temperature^2 for a divergence if set."""
        squared = self.temperature**2 if self.temperature_squared else 1.0
        weights = self.weights.items()
        return {name: w if name == "cross_entropy" else w * squared for name, w in weights}

    @property
    def divergences(self) -> list[str]:
        """Names of the terms in use that compare the student with the teacher's probabilities."""
        return [name for name in self.weights if name != "cross_entropy"]


class RampConfig(ConfigModel):
    """A share that changes linearly from the first step on, and then stays.

    ``from`` is a word of Python, so the field is ``start``; a run file may have either.
    """

    model_config = ConfigDict(populate_by_name=True)

    start: float = identity(0.0, ge=0, le=1, alias="from", description="Share at the first step.")
    to: float = identity(ge=0, le=1, description="Share after over_steps, and from then on.")
    over_steps: PositiveInt = identity(description="Optimizer steps over which the share changes.")


class PolicySamplingConfig(ConfigModel):
    """How the student samples its answers. The stop ids are the teacher's."""

    temperature: float = identity(
        1.0, ge=0, le=100, description="Softmax temperature of sampling; 0 is greedy decoding."
    )
    top_p: float = identity(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the most probable ids whose probabilities reach "
        "this sum.",
    )
    top_k: int = identity(0, ge=0, description="Sample from this many most probable ids; 0 is all.")


class PolicyConfig(ConfigModel):
    """Rows that the student writes and the teacher scores (on-policy distillation)."""

    student_share: float | RampConfig = identity(
        0.0,
        description="Share of the rows whose response the student writes, 0 to 1; or a ramp {from, "
        "to, over_steps}. Which rows these are follows from the seed. 0: none, and no sampler is "
        "started.",
    )
    objective: ObjectiveConfig = identity(
        ObjectiveConfig(forward_kl=0.5, reverse_kl=0.5),
        description="The loss on rows that the student wrote. cross_entropy is not allowed: it "
        "would teach the student its own samples.",
    )
    sampling: PolicySamplingConfig = identity(
        PolicySamplingConfig(), description="How the student samples its answers."
    )
    max_tokens: PositiveInt | None = identity(
        None,
        description="Longest answer of the student, in tokens. Default: "
        "teacher.sampling.max_tokens.",
    )
    num_replicas: PositiveInt | ReplicasConfig = operational(
        1,
        description="Replicas of the sampler, each with all of the student's weights; {min, max} "
        "for autoscaling, by the groups that wait for its slots. On GPUs each has one of its own; "
        "without GPUs they share the teacher's cores.",
    )
    resources_per_replica: Resources = operational(
        {}, description="Custom Ray resources that a sampler requests, e.g. {sampler: 1}."
    )
    accelerator_type: str | None = operational(
        None, description="Ray's name of the GPU type that a sampler runs on. Default: any."
    )
    label_selector: LabelSelector = operational(
        {}, description="Ray node labels that a sampler's node must have, e.g. {role: sampler}."
    )
    sync_every_steps: PositiveInt = operational(
        1, description="Optimizer steps after which the sampler gets the student's new weights."
    )
    max_staleness_steps: int | None = operational(
        None,
        ge=0,
        description="Most optimizer steps between the weights that wrote a row and the step that "
        "trains on it. Default: 8 where policy.objective is forward_kl alone, else 4.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = identity(
        None, description="Precision of the sampler's weights. Default: training.export_dtype."
    )
    merge_adapters: bool = operational(
        True,
        description="With student.lora: whether the sampler gets merged weights at each version. "
        "false: the frozen weights once and then the adapter alone, which is much less, for models "
        "of which vLLM serves adapters, and not with student.lora.modules_to_save.",
    )
    kv_cache_gib: float | None = operational(
        None, gt=0, description="KV cache of the sampler, in GiB. Default: teacher.kv_cache_gib."
    )
    max_logprob_gap: float | None = operational(
        None,
        gt=0,
        description="Mean absolute difference, in nats, that is allowed between the logprobs of "
        "the sampler and those of the student that is trained, on a fixed probe after each new "
        "version; the run stops at a larger one. Default: 0.001 with float32, else 0.5.",
    )

    @model_validator(mode="after")
    def _trains_on_divergences(self) -> "PolicyConfig":
        share = self.student_share
        if not isinstance(share, RampConfig) and not 0 <= share <= 1:
            raise ValueError(f"student_share is {share:g}; expected 0 to 1")
        if self.min_replicas == 0:
            raise ValueError(
                "num_replicas.min is 0, but rows are asked for once a sampler has the student's "
                "weights, so without one the run would wait for ever; set num_replicas.min: 1"
            )
        if self.objective.cross_entropy > 0:
            raise ValueError(
                f"objective.cross_entropy is {self.objective.cross_entropy:g}, which would teach "
                "the student its own samples; leave it out, and give a divergence a weight"
            )
        return self

    @property
    def min_replicas(self) -> int:
        """The smallest number of samplers."""
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas.min

    @property
    def max_replicas(self) -> int:
        """The largest number of samplers."""
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas.max

    @property
    def staleness_bound(self) -> int:
        """``max_staleness_steps``, or its default: forward KL weighs tokens by the teacher's
        probabilities and bears older texts than divergences that weigh them by the student's.
        """
        if self.max_staleness_steps is not None:
            return self.max_staleness_steps
        return 8 if set(self.objective.divergences) == {"forward_kl"} else 4

    @property
    def enabled(self) -> bool:
        """Whether the student writes any row."""
        share = self.student_share
        return share.start > 0 or share.to > 0 if isinstance(share, RampConfig) else share > 0

    def share_at(self, step: int) -> float:
        """Share of the rows of an optimizer step (from 0) that the student writes."""
        share = self.student_share
        if not isinstance(share, RampConfig):
            return float(share)
        done = min(1.0, step / share.over_steps)
        return share.start + done * (share.to - share.start)
