"""Small tokenizers of the kinds that model families use, with control tokens marked as theirs are.

The chat templates beside them, ``tests/hostile/templates/NAME.jinja``, render each family's
documented format. The vocabulary is a few hundred pieces; what matters is how added tokens are
marked, what the normaliser does, and whether the vocabulary has control tokens as pieces too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEMPLATES = Path(__file__).resolve().parents[1] / "hostile" / "templates"
SPECIAL: dict[str, Any] = {"special": True, "normalized": False}
VISIBLE: dict[str, Any] = {"special": False, "normalized": False}
MERGED = ["in", "th", "he", "an", "st", "ar", "er", "on", "en", "nd"]
LETTERS = "".join(chr(code) for code in range(33, 127))


@dataclass(frozen=True)
class Family:
    """One family. special, visible: control tokens that are marked as special, and that are not.

    answers: pairs that an assistant's words may hold. kind: of the tokenizer. flags: of all tokens.
    tools, names, parts: what its template takes beside texts.
    """

    special: tuple[str, ...]
    visible: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    kind: str = "bytes"
    bos: str | None = None
    eos: str | None = None
    flags: tuple[tuple[str, bool], ...] = ()
    tools: bool = False
    parts: bool = False
    system: bool = True

    @property
    def control(self) -> tuple[str, ...]:
        """All texts that no prompt may write."""
        return self.special + self.visible + self.answers


def piped(*names: str) -> tuple[str, ...]:
    """``<|NAME|>`` of each."""
    return tuple(f"<|{name}|>" for name in names)


def wide(*names: str) -> tuple[str, ...]:
    """The same with the bars and spaces of DeepSeek."""
    return tuple(f"<｜{name}｜>" for name in names)


THINK, CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
RESPONSE = ("<tool_response>", "</tool_response>")
CHATML = piped("im_start", "im_end", "endoftext")

FAMILIES: dict[str, Family] = {
    "qwen2": Family(CHATML, piped("fim_prefix", "file_sep"), CALL, eos="<|im_end|>", tools=True),
    "qwen3": Family(CHATML, (), THINK + CALL + RESPONSE, eos="<|im_end|>", tools=True),
    "smollm": Family((*CHATML, "<repo_name>", "<file_sep>"), eos="<|im_end|>"),
    "llama2": Family(("<unk>", "<s>", "</s>"), kind="pieces", bos="<s>", eos="</s>"),
    "llama3": Family(
        piped("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
        + piped("eom_id", "python_tag", "reserved_special_token_0"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        tools=True,
    ),
    "mistral": Family(
        ("<unk>", "<s>", "</s>"),
        kind="pieces",
        bos="<s>",
        eos="</s>",
        flags=(("normalized", True),),
    ),
    "tekken": Family(
        (
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]", "[/TOOL_RESULTS]"),
        ),
        bos="<s>",
        eos="</s>",
        tools=True,
    ),
    "gemma": Family(
        (
            *("<pad>", "<eos>", "<bos>", "<unk>"),
            *("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        ),
        kind="pieces",
        bos="<bos>",
        eos="<end_of_turn>",
        parts=True,
    ),
    "phi3": Family(
        ("<unk>", "<s>", *piped("endoftext", "assistant", "end", "user", "system")),
        ("</s>",),
        kind="pieces",
        eos="<|endoftext|>",
        flags=(("rstrip", True),),
    ),
    "phi4": Family(
        piped("endoftext", "im_start", "im_end", "im_sep"),
        eos="<|im_end|>",
        flags=(("lstrip", True), ("rstrip", True)),
    ),
    "deepseek": Family(
        wide("begin▁of▁sentence", "end▁of▁sentence"),
        wide("User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin")
        + wide("tool▁call▁end", "tool▁outputs▁begin", "tool▁outputs▁end", "tool▁sep")
        + wide("tool▁output▁begin", "tool▁output▁end"),
        THINK,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        tools=True,
    ),
    "command": Family(
        ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        piped("START_OF_TURN_TOKEN", "SYSTEM_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "harmony": Family(
        piped("start", "end", "message", "channel", "call", "return", "constrain", "endoftext"),
        eos="<|return|>",
        tools=True,
    ),
    "zephyr": Family(("<unk>", "<s>", "</s>"), kind="merged", bos="<s>", eos="</s>"),
    "olmo": Family(piped("endoftext"), bos="<|endoftext|>", eos="<|endoftext|>"),
    "granite": Family(
        piped("end_of_text", "start_of_role", "end_of_role", "tool_call"),
        eos="<|end_of_text|>",
        tools=True,
    ),
    "glm": Family(
        ("[gMASK]", "<sop>", *piped("endoftext", "user", "assistant", "system", "observation")),
        (),
        (*THINK, *CALL, *RESPONSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        eos="<|user|>",
        tools=True,
    ),
    "internlm": Family(
        ("<unk>", "<s>", "</s>", *piped("im_start", "im_end", "action_start", "action_end")),
        kind="merged",
        bos="<s>",
        eos="<|im_end|>",
    ),
    "nemotron": Family(
        ("<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"), kind="unigram", eos="</s>"
    ),
    "exaone": Family(
        ("[BOS]", "[PAD]", "[|endofturn|]"),
        ("[|system|]", "[|user|]", "[|assistant|]"),
        eos="[|endofturn|]",
    ),
    "kimi": Family(
        (*piped("im_end", "im_user", "im_assistant", "im_middle", "im_system"), "[BOS]", "[EOS]"),
        piped("tool_calls_section_begin", "tool_calls_section_end", "tool_call_begin")
        + piped("tool_call_argument_begin", "tool_call_end"),
        eos="<|im_end|>",
        tools=True,
        parts=True,
    ),
    "baichuan": Family(
        ("<unk>", "<s>", "</s>"), ("<reserved_106>", "<reserved_107>"), kind="merged", eos="</s>"
    ),
    "minimax": Family(
        ("<end_of_document>",),
        ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"),
        eos="<end_of_sentence>",
        parts=True,
    ),
    # No family, but all that may go wrong: contents are joined, cut, changed in their case, and
    # written within what becomes a control token; tokens are sought in normalised text.
    "joining": Family(
        ("<unk>", *piped("open", "answer", "shut")),
        kind="unigram",
        eos="<|shut|>",
        flags=(("normalized", True),),
        parts=True,
        system=False,
    ),
}


def build(folder: Path, name: str) -> Family:
    """Write the family's tokenizer, settings and chat template into a folder."""
    family = FAMILIES[name]
    tokenizer = KINDS[family.kind](family)
    for texts, marks in ((family.special, SPECIAL), (family.visible + family.answers, VISIBLE)):
        tokens = [AddedToken(text, **(marks | dict(family.flags))) for text in texts]
        add = tokenizer.add_special_tokens if marks["special"] else tokenizer.add_tokens
        add(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": family.bos, "eos_token": family.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return family


def _bytes(_: Family) -> Tokenizer:
    """Bytes with a few merges, as GPT-2, Llama 3 and Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *MERGED])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(m[0], m[1]) for m in MERGED]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(family: Family, merged: bool = False) -> Tokenizer:
    """Pieces with a space in front and bytes for the rest, as Llama 2 and Gemma.

    merged: the merges of the vocabulary lead to its control tokens.
    """
    merges = [(m[0], m[1]) for m in MERGED]
    pieces = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *MERGED]
    for text in family.control if merged else ():
        known = [text[:n] for n in range(2, len(text) + 1)]
        merges += [(text[: n - 1], text[n - 1]) for n in range(2, len(text) + 1)]
        pieces += [piece for piece in known if piece not in pieces]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = list(dict.fromkeys(merges))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _unigram(family: Family) -> Tokenizer:
    """Pieces by probability behind a normaliser that makes many characters ASCII, as T5."""
    pieces = [*family.special, "▁", *LETTERS, *MERGED]
    scores = [(piece, -1.0 - len(pieces) / 100) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\u200b", ""), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


KINDS: dict[str, Any] = {
    "bytes": _bytes,
    "pieces": _pieces,
    "merged": lambda family: _pieces(family, merged=True),
    "unigram": _unigram,
}
