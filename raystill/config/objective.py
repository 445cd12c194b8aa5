"""Configuration of the student, its objective and its training."""

from typing import Literal

from pydantic import model_validator

from raystill.config.base import ConfigModel, identity

TERMS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "cross_entropy",
)
"""What an objective is a weighted sum of."""


class TokenWeightsConfig(ConfigModel):
    """How much each response token counts; the sum of all weights is what a step's loss is over."""

    truncated_rows: float = identity(
        1.0, ge=0, le=100, description="Weight of rows whose answer was cut off by max_tokens."
    )
    by: Literal["none", "entropy", "confidence"] = identity(
        "none",
        description="Shares a row's weight among its tokens in proportion to the teacher's entropy "
        "(over ids and tail, so with a truncated signal a lower bound) or to its best id's "
        "probability (with kind sampled the drawn id's); each row keeps its sum. With kind hidden "
        "this takes the teacher's logits once more.",
    )


class ObjectiveConfig(ConfigModel):
    """What the student minimises: a weighted sum; a weight of 0 leaves a term out."""

    forward_kl: float = identity(
        0.0, ge=0, description="Weight of KL(teacher || student) on the signal's partition."
    )
    reverse_kl: float = identity(
        0.0, ge=0, description="Weight of KL(student || teacher) on the signal's partition."
    )
    jsd: float = identity(
        0.0,
        ge=0,
        description="Weight of the Jensen-Shannon divergence: jsd_beta KL(teacher || mixture) + "
        "(1 - jsd_beta) KL(student || mixture).",
    )
    jsd_beta: float = identity(
        0.5,
        gt=0,
        lt=1,
        description="The teacher's share in jsd's mixture; instead of the ends 0 and 1 give "
        "forward_kl or reverse_kl a weight.",
    )
    skew_forward_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(teacher || skew_alpha teacher + (1 - skew_alpha) student).",
    )
    skew_reverse_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(student || skew_alpha student + (1 - skew_alpha) teacher).",
    )
    skew_alpha: float = identity(
        0.1,
        gt=0,
        lt=1,
        description="What a skew divergence mixes of its first distribution into its second; "
        "instead of the end 0 give forward_kl or reverse_kl a weight (at 1 nothing is learned).",
    )
    total_variation: float = identity(
        0.0, ge=0, description="Weight of half the sum of |teacher - student|: 1 - acceptance."
    )
    cross_entropy: float = identity(
        0.0, ge=0, description="Weight of cross entropy on the response tokens."
    )

    temperature: float = identity(
        1.0,
        gt=0,
        le=100,
        description="Divides both sides' logits in every divergence, not in cross_entropy; other "
        "than 1 with signal.kind: hidden only.",
    )
    temperature_squared: bool = identity(
        False,
        description="Multiply divergences by the squared temperature, so that their gradients keep "
        "their size.",
    )

    token_weights: TokenWeightsConfig = identity(
        TokenWeightsConfig(), description="How much each response token counts."
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
                f"temperature is {self.temperature:g}, which changes divergences only, and just "
                "cross_entropy has a weight; set temperature: 1, or give a divergence a weight"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Terms with a weight above zero, by name."""
        return {name: weight for name in TERMS if (weight := getattr(self, name)) > 0}

    @property
    def factors(self) -> dict[str, float]:
        """What each term in use is multiplied by: its weight, and T^2 for a divergence if asked."""
        squared = self.temperature**2 if self.temperature_squared else 1.0
        weights = self.weights.items()
        return {name: w if name == "cross_entropy" else w * squared for name, w in weights}

    @property
    def divergences(self) -> list[str]:
        """Terms in use that compare the student with the teacher's probabilities."""
        return [name for name in self.weights if name != "cross_entropy"]
