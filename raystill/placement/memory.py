"""How much memory a student worker needs, from sizes alone: no torch, no weights.

`check` prints the table. Two moments are compared: the loss, when all activations are kept, and the
backward pass of the last layer. Whole steps of 8B and 70B shapes, sharded over 8 and 64 ranks and
run on tensors without data, are held to it by ``tests/train/test_memory_counted.py`` and
``tests/train/test_memory_whole_step.py``.

Legend: P parameters, N workers that share a copy, D hidden size, F width of a layer's neurons, q
and k widths of all query and key heads, T tokens of one forward pass, V vocabulary. Sizes in bytes.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystill.base.records import natural
from raystill.config.training import TrainingConfig

STATE_BYTES = {"adamw": 8.0, "adamw_bf16": 6.0, "adamw_8bit": 2.0 + 8 / 256}
"""Bytes a parameter of the optimizer's state, for weights in float32 and bfloat16."""
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2}
CHUNK = {True: 512 << 20, False: 64 << 20}
WIDE_BLOCKS = {True: 4 * (256 << 20), False: 8 << 20}
"""Logits of one chunk, and of the blocks that are converted to float32, with and without a GPU."""
NORMED_KINDS = ("qwen3", "gemma3", "olmo2", "olmo3", "glm4_moe", "smollm")
RESERVE, UNUSED = 1.5e9, 0.05
"""What a GPU's driver and libraries take, and the share that the allocator cannot use."""
GPU_BYTES: dict[str, float] = {
    **{"T4": 16e9, "V100": 16e9, "L4": 24e9, "A10G": 24e9, "A10": 24e9, "L40": 48e9, "L40S": 48e9},
    **{"A100": 40e9, "A100-40G": 40e9, "A100-80G": 80e9, "H100": 80e9, "H200": 141e9},
    **{"B200": 180e9, "B300": 268e9, "GB200": 186e9},
}
"""Memory of a GPU by Ray's name of its type; of several sizes the smallest."""

CAPTURE_BLOCK_BYTES = 256 << 10
"""A block of the memory in which an engine keeps hidden states until its replica reads them."""
CAPTURE_PENDING_BYTES = 128 << 20
"""Rows on their way from a GPU that are waited for before more are sent."""


@dataclass(frozen=True)
class Adapters:
    """What is trained where the model's own parameters are frozen (LoRA).

    trained: number of parameters, modules that are trained whole included. base: bytes of a frozen
    one.
    """

    trained: int
    base: int


@dataclass(frozen=True)
class Parts:
    """Numbers of parameters: of each layer, outside of layers, and of the output head alone.

    adapters: None: all parameters are trained.
    """

    layers: tuple[int, ...]
    outside: int
    head: int
    adapters: "Adapters | None" = None

    @property
    def total(self) -> int:
        """All parameters; a tied head is counted once."""
        return sum(self.layers) + self.outside

    @classmethod
    def of(
        cls,
        shapes: Iterable[tuple[str, Sequence[int]]],
        head: int,
        kept: Collection[int] | None = None,
    ) -> "Parts":
        """From names and shapes of tensors; kept: only these layers. head: its rows times D."""
        layers: dict[int, int] = {}
        outside = 0
        for name, shape in shapes:
            layer = natural(name.partition("layers.")[2].partition(".")[0])
            if layer is None:
                outside += math.prod(shape)
            elif kept is None or layer in kept:
                layers[layer] = layers.get(layer, 0) + math.prod(shape)
        return cls(tuple(layers[number] for number in sorted(layers)), outside, head)


@dataclass(frozen=True)
class Decoder:
    """The widths on which activations depend. normed_heads: queries and keys have norms too."""

    hidden: int
    ffn: int
    queries: int
    keys: int
    normed_heads: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Decoder | None":
        """By a text decoder's ``config.json``; None where it does not name its widths."""
        lists = {
            k: v for k, v in config.items() if isinstance(v, list) and {*map(type, v)} == {int}
        }
        found = {**config, **{name: max(by_layer) for name, by_layer in lists.items()}}
        hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
        if not hidden or not heads:
            return None
        size = found.get("head_dim") or hidden // heads
        ffn = found.get("intermediate_size") or 4 * hidden
        if active := found.get("num_experts_per_tok"):
            experts = found.get("moe_intermediate_size") or ffn
            shared = (found.get("n_shared_experts") or 0) * experts
            ffn = active * experts + (found.get("shared_expert_intermediate_size") or shared)
        normed = str(config.get("model_type", "")).startswith(NORMED_KINDS)
        keys = (found.get("num_key_value_heads") or heads) * size
        return cls(hidden, ffn, heads * size, keys, normed)

    def activation_bytes(self, stream: int, products: int) -> float:
        """Of one token in one layer, kept for the backward pass.

        stream, products: bytes of a number of the residual stream, and of one that matrix products
        read. Norms and the residual stream are in the precision of the weights, or in that of the
        products (``training.residual_dtype``), and norms computed in float32. Attention
        is FlashAttention or SDPA's causal kernel, which read a key once for all of its queries. A
        mask [S, S], which packed rows need in SDPA, is not counted, nor are keys and values that
        are repeated for it, 2 c (q - k).
        """
        wide = max(stream, products)
        norms = {(4, 2): 26, (2, 2): 16, (4, 4): 24, (8, 8): 48}[(wide, products)]
        both = self.queries + self.keys
        # Queries, keys, values and what comes out; a number in float32 for each head of 128.
        heads = 2.0 * products * both + self.queries / 32
        if self.normed_heads:  # Before the norm, at least in float32, and after it.
            heads += (max(4, products) + products + 1 / 32) * both
        return norms * self.hidden + 4.0 * products * self.ffn + heads


@dataclass(frozen=True)
class Need:
    """Bytes of one worker, on its device, and in host memory beside what a process takes anyway."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float
    host: float = 0.0
    reserve: float = 0.0

    @property
    def device(self) -> float:
        """All that is on the device at the worst moment, with the reserve."""
        parts = (self.weights, self.gradients, self.optimizer, self.gathered)
        return sum(parts) + self.activations + self.loss + self.reserve


def need(
    training: TrainingConfig,
    parts: Parts,
    decoder: Decoder,
    *,
    workers: int,
    tokens: int,
    on_gpu: bool = True,
) -> Need:
    """What one of ``workers`` needs for forward passes of ``tokens`` tokens, padding included."""
    w = WIDTHS[training.weights_dtype]
    c = _product_bytes(training, on_gpu)
    sharded = training.strategy == "fsdp" and workers > 1
    stream = _stream_bytes(training, parts, workers, on_gpu)
    share = (training.shard_group_size or workers) if sharded else 1
    adapters = parts.adapters
    trained, b = (adapters.trained, adapters.base) if adapters else (parts.total, w)
    state = STATE_BYTES[training.optimizer] * (2 if w == 8 else 1)
    weights, gradients, optimizer = (trained * n / share for n in (w, w, state))
    root = layers = host = 0.0
    if adapters:
        weights += parts.total * b / share
    if sharded:
        # The root is gathered in the precision of the residual stream.
        root, layers = float(parts.outside * stream), _layer_bytes(parts, b, c)
        if training.reduce_gradients == "once":
            root += trained * max(w, 4)
        if training.cpu_offload:
            host, weights, gradients, optimizer = weights + gradients + optimizer, 0.0, 0.0, 0.0
    kept = kept_activations(training, parts, decoder, tokens, workers=workers, on_gpu=on_gpu)
    head = stream if sharded else b
    loss = _loss_bytes(parts, decoder, head, c, tokens, on_gpu)
    later = kept
    if training.activation_checkpointing:
        later += tokens * decoder.activation_bytes(stream, c)  # Of the layer computed again.
    left = 0.0 if adapters else float(parts.head * (max(4, b) if head == b else head))
    # DDP makes its buckets anew as the second step begins, when gradients are in the old ones.
    buckets = gradients if training.strategy == "ddp" and workers > 1 else 0.0
    moments = ((root, kept, loss), (root + layers, later, left), (buckets, 0.0, 0.0))
    gathered, activations, loss = max(moments, key=sum)
    if buckets:  # In the first step each gradient is beside its bucket, and there is no state yet.
        optimizer = max(optimizer, buckets)
    reserve = 0.0
    if on_gpu:
        used = weights + gradients + optimizer + gathered + activations + loss
        reserve = RESERVE + used * UNUSED
    return Need(weights, gradients, optimizer, gathered, activations, loss, host, reserve)


def kept_activations(
    training: TrainingConfig,
    parts: Parts,
    decoder: Decoder,
    tokens: int,
    *,
    workers: int,
    on_gpu: bool = True,
) -> float:
    """What the forward pass of all layers keeps for the backward pass."""
    stream = _stream_bytes(training, parts, workers, on_gpu)
    c = _product_bytes(training, on_gpu)
    row = max(stream, c) * decoder.hidden
    each = row if training.activation_checkpointing else decoder.activation_bytes(stream, c)
    # The last norm computes at least in float32.
    return tokens * (each * len(parts.layers) + row + max(stream, c, 4) * decoder.hidden)


def gathered_whole(training: TrainingConfig, parts: Parts) -> float:
    """All weights at once, as a sharded student gathers them on a GPU."""
    stream = _stream_bytes(training, parts, 2, True)
    c = min(_product_bytes(training, True), parts.adapters.base if parts.adapters else 8)
    return float(sum(parts.layers) * c + parts.outside * stream)


def _stream_bytes(training: TrainingConfig, parts: Parts, workers: int, on_gpu: bool) -> int:
    """Bytes of a number of the residual stream."""
    b = parts.adapters.base if parts.adapters else WIDTHS[training.weights_dtype]
    narrow = b == 4 and training.narrow_residual(workers)
    return min(b, _product_bytes(training, on_gpu)) if narrow else b


def calibration_need(
    parts: Parts,
    decoder: Decoder,
    tokens: int,
    on_gpu: bool = True,
    workers: int = 1,
    recompute: bool = False,
) -> Need:
    """What each process of `calibrate` needs for forward passes of ``tokens`` tokens, in float32.

    ``workers`` processes share one student. Two gradients are held at a time. On a GPU the one that
    all others are compared with waits in host memory. The teacher's head counts as large as the
    student's. recompute: activations are computed again in the backward pass.
    """
    share = parts.total * 4.0 / workers
    gradients = share if on_gpu else 2 * share
    root, layers = (parts.outside * 4.0, _layer_bytes(parts, 4, 4)) if workers > 1 else (0.0, 0.0)
    layer, row = decoder.activation_bytes(4, 4), 4.0 * decoder.hidden
    each, again = (row, layer) if recompute else (layer, 0.0)
    activations = tokens * (each * len(parts.layers) + 2 * row + again)
    loss = _loss_bytes(parts, decoder, 4, 4, tokens, on_gpu)
    gathered, loss = max((root, loss), (root + layers, 4.0 * parts.head), key=sum)
    loss += 4.0 * parts.head
    used = share + gradients + gathered + activations + loss
    return Need(
        weights=share,
        gradients=gradients,
        optimizer=0.0,
        gathered=gathered,
        activations=activations,
        loss=loss,
        host=share if on_gpu else 0.0,
        reserve=RESERVE + used * UNUSED if on_gpu else 0.0,
    )


def longest_pass(
    training: TrainingConfig,
    parts: Parts,
    decoder: Decoder,
    *,
    workers: int,
    has: float,
    on_gpu: bool = True,
) -> int:
    """Most tokens of one forward pass for a worker with ``has`` bytes; 0: not even one."""

    def fits(tokens: int) -> bool:
        return (
            need(training, parts, decoder, workers=workers, tokens=tokens, on_gpu=on_gpu).device
            <= has
        )

    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def remedies(
    training: TrainingConfig,
    parts: Parts,
    decoder: Decoder,
    *,
    workers: int,
    tokens: int,
    has: float,
) -> list[str]:
    """Settings that fit ``has`` bytes, those that cost least first; each alone, then together."""
    tries: list[tuple[str, dict[str, Any], int]] = []
    sharded: dict[str, Any] = {"strategy": "fsdp", "num_workers": workers}
    if training.strategy == "ddp" and workers > 1:
        tries.append(("training.strategy: fsdp", sharded, workers))
    checkpointing = {"activation_checkpointing": True}
    tries.append(("training.activation_checkpointing: true", checkpointing, workers))
    small = {"optimizer": "adamw_bf16", "compute_dtype": "auto", "param_dtype": "float32"}
    if training.beta2 <= 0.99:
        tries.append(("training.optimizer: adamw_bf16", small, workers))
    for more in (2, 4, 8, 16, 32):
        number = workers * more
        grown = {"strategy": "fsdp", "num_workers": number, "shard_group_size": None}
        name = f"training.num_workers: {number} with strategy: fsdp"
        tries.append((name, grown, number))
        name += " and activation_checkpointing: true"
        tries.append((name, grown | checkpointing, number))
    if workers > 1:
        name = "training.strategy: fsdp, activation_checkpointing and cpu_offload: true"
        tries.append((name, {**sharded, **checkpointing, "cpu_offload": True}, workers))
    found: dict[str, str] = {}
    for name, changes, number in tries:
        changed = training.model_copy(update=changes)
        needed = need(changed, parts, decoder, workers=number, tokens=tokens).device
        if needed <= has:  # Of several numbers of workers the smallest.
            kind = " ".join(sorted(changes))
            found.setdefault(kind, f"{name} ({needed / 1e9:.1f} GB)")
    return list(found.values())


def captured_bytes(rows: int, tokens: int, hidden: int, on_gpu: bool) -> int:
    """Memory of a replica's machine that captured hidden states take at most.

    ``rows`` answers of ``tokens`` tokens are in the engine, each with a state of ``hidden``
    numbers of 2 bytes a token, in whole blocks; a row's successor may begin before its last block
    is given back. Rows on their way from a GPU come on top.
    """
    blocks = -(-tokens // (CAPTURE_BLOCK_BYTES // (2 * hidden))) + 1
    return rows * blocks * CAPTURE_BLOCK_BYTES + on_gpu * CAPTURE_PENDING_BYTES


def describe(needed: Need, where: str = "on its GPU") -> str:
    """The parts of a need in words, in GB."""
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimizer state": needed.optimizer,
        "gathered layers": needed.gathered,
        "activations": needed.activations,
        "loss": needed.loss,
        "reserve": needed.reserve,
    }
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
    host = f"; {needed.host / 1e9:.1f} GB of host memory" if needed.host else ""
    return f"{needed.device / 1e9:.1f} GB {where} ({listed}){host}"


def _layer_bytes(parts: Parts, b: int, c: int) -> float:
    """Of layers that are whole in a backward pass.

    b, c: bytes of a weight, and of one that is gathered.

    The running layer, and the one fetched ahead, in the buffer that it came in. The gradients of
    the layer before, in the buffer that they leave by, and the first one of the running layer: a
    quarter of it.
    """
    layer = max(parts.layers, default=0)
    gradients = 0.0 if parts.adapters else layer * (c / 4 + max(b, 4))
    return 2 * layer * c + gradients


def _product_bytes(training: TrainingConfig, on_gpu: bool) -> int:
    """Bytes of a number that matrix products read."""
    if training.weights_dtype != "float32":
        return WIDTHS[training.weights_dtype]
    if training.compute_dtype == "auto":
        return 2 if on_gpu else 4
    return WIDTHS[training.compute_dtype]


def _loss_bytes(parts: Parts, decoder: Decoder, w: int, c: int, tokens: int, on_gpu: bool) -> float:
    """Of the objective at the end of a forward pass: logits, and what the head's gradient takes."""
    vocab = parts.head // decoder.hidden
    chunk = min(CHUNK[on_gpu], tokens * vocab * c) + min(
        WIDE_BLOCKS[on_gpu], 4 * tokens * vocab * 4
    )
    # The head in the precision of products, its gradient in it, and in float32 over the chunks.
    head = parts.head * (c if w > c else 0)
    if not parts.adapters:
        head += parts.head * ((c if c < 4 else 0) + max(4, w))
    return chunk + head + 2.0 * tokens * decoder.hidden * c
