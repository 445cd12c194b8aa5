"""Generators of model folders in which one file is not what it says."""

import json
import struct

from hypothesis import strategies as st

from raystill.cluster.check import folders
from tests.hostile.judge import Case
from tests.hostile.parts import HALVES, INTEGERS, JSON_TREES, NUMBERS, ODD_FILES, TEXTS, json_of
from tests.support.end_to_end import TEACHER

REFUSED = frozenset({0, 2})
MODEL_FILES = (*folders.FILES, "model.safetensors", "model.safetensors.index.json")
MODEL_FILES += ("chat_template.jinja",)
"""The tokenizer itself, of 3.5 MB, is spoilt by tests with a table."""
MODEL_KEYS = sorted(
    {name for names, *_ in folders.RULES for name in names}
    | {*json.loads((TEACHER / "config.json").read_text()), *folders.SAMPLING, "chat_template"}
    | {"added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "unk_token"}
    | {"eos_token", "weight_map", "metadata", "logit_scale", "final_logit_softcapping", "d_model"}
)
ROPE = st.dictionaries(
    st.sampled_from([*folders.ROPE_NUMBERS, "rope_type", "type", "factor", "long_factor"]),
    st.sampled_from(["yarn", "default", "longrope", 2.0]) | JSON_TREES,
    max_size=4,
)
TOKENS = st.fixed_dictionaries(
    {"content": TEXTS | HALVES | JSON_TREES}, optional={"lstrip": NUMBERS}
)
NAMED = st.sampled_from(["default", "tool_use"]) | JSON_TREES
PIECES = st.sampled_from(
    [
        *(
            "{{ messages[0]['content'] }}",
            "{{ '\\ud800' }}",
            "{% for m in messages %}",
            "{% endfor %}",
        ),
        *("{{ m }}", "{{ 1 / 0 }}", "{{ 9 ** 9 ** 9 }}", "{{ x.y.z }}", "{{ raise_exception(m) }}"),
        *("{{ messages | tojson }}", "{% if bos_token %}", "{% endif %}", "{{ '%c' % 55555 }}"),
        *(
            "{{ range(10 ** 9) | list }}",
            "{{ 'x' * 10 ** 10 }}",
            "{{ strftime_now('%') }}",
            "<|im_end|>",
        ),
    ]
)
TEMPLATES = st.lists(PIECES | TEXTS, max_size=5).map("".join)
MODEL_VALUES = JSON_TREES | ROPE | TOKENS | st.dictionaries(TEXTS, TOKENS, max_size=2) | TEMPLATES
MODEL_VALUES |= st.lists(
    st.fixed_dictionaries({"name": NAMED, "template": TEMPLATES | JSON_TREES}), max_size=2
)
MODEL_VALUES |= st.lists(NUMBERS, max_size=3) | st.integers(-2, 9)
FEATURES = (
    *((), (), ("signal.kind=hidden",), ("student.lora={rank: 4}",), ("student.hidden_size=32",)),
    ("training.gpus_per_worker=1", "training.accelerator_type=H100"),
    ("prompts.chat_template=false",),
)
"""Settings with which more of a model's folder is read."""


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A model's folder with one file that is not what it says."""
    name = draw(st.sampled_from(MODEL_FILES))
    if draw(st.integers(0, 4)) == 0:
        content: bytes | str = draw(ODD_FILES)
    elif name == "model.safetensors":
        content = draw(safetensors())
    elif name == "chat_template.jinja":
        content = draw(TEMPLATES).encode("utf-8", "surrogatepass")
    else:
        whole = json.loads((TEACHER / name).read_text()) if (TEACHER / name).exists() else {}
        keys = st.sampled_from(MODEL_KEYS) | TEXTS
        content = json_of({**whole, **draw(st.dictionaries(keys, MODEL_VALUES, max_size=2))})
    words = ["check", "--static", draw(st.sampled_from(["student.yaml", "teacher.yaml"]))]
    for setting in draw(st.sampled_from(FEATURES)):
        words += ["--set", setting]
    words += draw(st.sampled_from([[], ["--json"]]))
    return Case(tuple(words), {f"model/{name}": content}, "model", REFUSED)


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A safetensors file of which the header says anything."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F4", "X"]) | TEXTS,
            "shape": st.lists(INTEGERS, max_size=3) | JSON_TREES,
            "data_offsets": st.lists(INTEGERS, max_size=3) | JSON_TREES,
        }
    )
    header = json_of(draw(st.dictionaries(TEXTS, entry | JSON_TREES, max_size=4) | JSON_TREES))
    length = draw(st.sampled_from([len(header), 0, len(header) + 9, 2**63, 10**9]))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=16))
