"""The static check reports every mistake at once, fast, and without the heavy imports."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models

from raystill.base import console
from raystill.base.console import ReadingProgress
from raystill.base.run_folder import CONFIG, TRAIN_PROMPTS, RunFolder
from raystill.cluster.check.output import check_store
from raystill.cluster.check.static import Checked, check_run_file
from raystill.config.load import config_text
from raystill.datasets.rows.schema import PROMPT_SCHEMA
from raystill.model import files
from raystill.model.weights import header_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-teacher"
HEAVY = ("torch", "ray", "vllm", "transformers")


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound run file of 12 prompts in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    rows = [{"prompt": f"Count to {i}.", "source": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = {
        "teacher": {"model": str(TINY), "sampling": {"max_tokens": 8}},
        "student": {"layers": [1]},
        "prompts": {"path": "prompts.jsonl"},
        "training": {"rows_per_step": 4},
        "stream": {"group_rows": 2},
        "evaluation": {"held_out_sources": ["b"]},
    }
    path = tmp_path / "sound.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    return [str(problem) for problem in check_run_file(str(path), overrides).problems]


def only(path: Path, *overrides: str) -> str:
    (problem,) = problems(path, *overrides)
    return problem


def test_a_sound_run_is_prepared(run_file: Path, tmp_path: Path) -> None:
    checked = check_run_file(str(run_file))
    assert checked.problems == []
    assert checked.folder is not None
    assert checked.folder.path == str(tmp_path / "runs/sound")
    assert not Path(checked.folder.path).exists()
    prepared = checked.prepared
    assert prepared is not None
    assert (prepared.num_train_rows, prepared.num_held_out_rows) == (6, 6)
    assert prepared.teacher_folder == str(TINY)
    assert prepared.student_folder is None
    assert prepared.train.schema.equals(PROMPT_SCHEMA)
    assert prepared.sampling["max_tokens"] == 8
    assert "6 to train on (2 steps of 4 rows), 6 held out" in prepared.describe()


def test_the_check_is_fast_and_imports_nothing_heavy(run_file: Path) -> None:
    script = (
        "import sys, time\n"
        "from raystill.cluster.check.static import check_run_file\n"
        f"checked = check_run_file({str(ROOT / 'configs' / 'quickstart.yaml')!r})\n"
        f"check_run_file({str(run_file)!r}, ['prompts.path=none', 'signal.topk=1'])\n"
        "from raystill.config.describe import describe_fields; describe_fields()\n"
        "assert checked.prepared is not None, checked.problems\n"
        # Of this process: the machine's other work must not fail it.
        f"print([name for name in {HEAVY} if name in sys.modules], time.process_time())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    loaded, seconds = result.stdout.strip().rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("signal.topk=3", ["signal.topk: unknown key", "signal.top_k"]),
        ("training.epochs=two", ["training.epochs: is 'two'; expected an integer"]),
        ("prompts.path=missing.jsonl", ["no such file: 'missing.jsonl'"]),
        ("signal.top_k=50000", ["signal.top_k: is 50000", "49152 or less"]),
        ("evaluation.top_k=50000", ["evaluation.top_k: is 50000", "49152 or less"]),
        ("store.path=/proc/store", ["store.path: /proc/store cannot be written"]),
        ("store.path=sound.yaml/store", ["sound.yaml is a file"]),
        ("student.layers=[0, 5]", ["student.layers: has [5]", "layers 0 to 1"]),
        ("student.layers=[0, 0]", ["student.layers: names [0] more than once"]),
        ("student.ffn_size=100000", ["student.ffn_size: is 100000", "name at most"]),
        ("student.num_heads=7", ["student.num_heads: is 7", "possible are"]),
        ("student.hidden_size=63", ["student.hidden_size: is 63", "hidden_size: 62 or 64"]),
        (
            "objective={jsd: 1, router_balance: 0.1}",
            ["objective.router_balance: is 0.1", "no experts"],
        ),
        ("student.refit=2", ["student.refit: is 2"]),
        ("stream.max_rows_ahead=6", ["rows_per_step + 2 * num_workers * group_rows (8)", "24"]),
        ("stream.max_rows_ahead=23", ["target_ongoing_requests * group_rows", "24 or more"]),
        ("evaluation.held_out_sources=[c]", ["'c' is no source", "a, b"]),
        ("teacher.max_model_len=9000", ["teacher.max_model_len: is 9000", "8192 or less"]),
        ("teacher.sampling.stop_token_ids=[-1]", ["has -1", "from 0 to 49151"]),
        ("teacher.model=models/none", ["teacher.model: ", "models/none"]),
        ("output.path=/proc/run", ["output.path: /proc/run cannot be written"]),
        ("output.path=sound.yaml/run", ["sound.yaml is a file"]),
        ("prompts.chat_template=3", ["prompts.chat_template: is 3"]),
        ("prompts.template_date=today", ["prompts.template_date: is 'today'; expected a day as"]),
        ("prompts.template_date=31.12.2031", ["is '31.12.2031'", "YYYY-MM-DD, or null"]),
        ("prompts.template_date=2031-02-30", ["begins like a number or a date"]),
        ("prompts.template_date='2031-12-31 10:00'", ["prompts.template_date: is '2031-12-31 10"]),
    ],
)
def test_one_mistake_is_one_problem(
    run_file: Path, override: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if override.startswith("stream.max_rows_ahead"):
        problem = only(run_file, override, "teacher.target_ongoing_requests=8")
    else:
        problem = only(run_file, override)
    for word in words:
        assert word in problem


def test_several_mistakes_are_reported_together(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    reported = problems(
        run_file,
        "prompts.path=[broken.jsonl, missing.jsonl]",
        "signal.topk=3",
        "signal.top_k=50000",
        "training.learning_rate=fast",
        "output.path=/proc/run",
        "student.layers=[9]",
    )
    for words in (
        "signal.topk: unknown key",
        "signal.top_k: is 50000",
        "training.learning_rate: is 'fast'",
        "broken.jsonl, line 2: is not JSON",
        "no such file: 'missing.jsonl'",
        "output.path: /proc/run cannot be written",
        "student.layers: has [9]",
    ):
        assert any(words in problem for problem in reported), (words, reported)
    assert len(reported) == 7


@pytest.mark.parametrize(
    ("override", "is_wrong"),
    [
        ("signal.topk=3", True),
        ("training.epochs=two", True),
        ("training", True),
        ("objective.jsd_beta=0", True),
        ("prompts.path=missing.jsonl", False),
        ("student.layers=[9]", False),
        ("output.path=/proc/run", False),
    ],
)
def test_a_wrong_run_file_differs_from_one_that_does_not_fit_its_surroundings(
    run_file: Path, override: str, is_wrong: bool
) -> None:
    checked = check_run_file(str(run_file), [override])
    assert checked.problems
    assert checked.file_is_wrong == is_wrong


def test_a_file_that_is_no_run_file_is_wrong(run_file: Path) -> None:
    assert check_run_file("none.yaml").file_is_wrong
    run_file.write_text("teacher: {model\n")
    assert check_run_file(str(run_file)).file_is_wrong


def test_empty_and_broken_prompt_files_are_named(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: holds no prompts" in only(run_file, "prompts.path=empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    assert "broken.jsonl, line 2: is not JSON" in only(run_file, "prompts.path=broken.jsonl")


def test_a_prompt_longer_than_the_context_is_refused_or_dropped(
    run_file: Path, tmp_path: Path
) -> None:
    with (tmp_path / "prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "word " * 70, "source": "a"}))
    problem = only(run_file, "teacher.max_model_len=64")
    assert "1 of 13 prompts are longer than 63 tokens" in problem
    assert "prompts.jsonl, line 13" in problem
    checked = check_run_file(
        str(run_file), ["teacher.max_model_len=64", "stream.max_drop_fraction=0.1"]
    )
    assert checked.problems == []
    assert checked.prepared is not None
    assert checked.prepared.dropped == {"too_long": 1}


def make_model(folder: Path, tokens: dict[str, int] | None = None, **config: Any) -> Path:
    """A model folder without weights worth the name; the tiny teacher's tokenizer by default."""
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    if tokens is None:
        shutil.copy(TINY / "tokenizer.json", folder)
    else:
        Tokenizer(models.WordLevel(tokens, unk_token="a")).save(str(folder / "tokenizer.json"))
    sizes = {"vocab_size": 49152, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    settings = {"model_type": "llama", **sizes}
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


STUDENT = ("student.layers=null", "student.init=model")


def test_a_student_with_another_tokenizer_is_refused(run_file: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", {"a": 0, "b": 1})
    problem = only(run_file, *STUDENT, f"student.model={other}")
    assert problem.startswith("student.model: ")
    assert "another tokenizer" in problem
    assert "id 0 is '<|endoftext|>' for the teacher and 'a' for the student" in problem


def test_a_student_with_the_same_ids_is_accepted(run_file: Path, tmp_path: Path) -> None:
    same = make_model(tmp_path / "same", vocab_size=49280)
    text = json.loads((same / "tokenizer.json").read_text())
    (same / "tokenizer.json").write_text(json.dumps(text, indent=1))  # other bytes, same ids
    checked = check_run_file(str(run_file), [*STUDENT, f"student.model={same}"])
    assert checked.problems == []
    assert checked.prepared is not None
    assert checked.prepared.student_folder == str(same)
    assert any("eos token" in notice for notice in checked.notices)


@pytest.mark.parametrize(("num_workers", "noticed"), [("1", True), ("2", False), ("[1, 2]", True)])
def test_a_notice_says_that_a_single_worker_is_not_sharded(
    run_file: Path, num_workers: str, noticed: bool
) -> None:
    overrides = ["training.strategy=fsdp", f"training.num_workers={num_workers}"]
    checked = check_run_file(str(run_file), overrides)
    assert checked.problems == []
    assert any("training.strategy is fsdp" in notice for notice in checked.notices) == noticed


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"final_logit_softcapping": -30.0}, "final_logit_softcapping is -30.0"),
        ({"logits_scaling": 0}, "logits_scaling is 0"),
        ({"text_config": {"logit_scale": "large"}}, "logit_scale is 'large'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"max_position_embeddings": 16}, "takes at most 16 tokens"),
    ],
)
def test_students_this_version_cannot_train_are_refused(
    run_file: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    folder = make_model(tmp_path / "student", **config)
    assert words in only(run_file, *STUDENT, f"student.model={folder}")


EXPERTS = "model.layers.{}.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "shape", "layer", "words"),
    [
        ("model.layers.{}.self_attn.qkv_proj.weight", (128, 64), 1, "qkv_proj.weight, which is no"),
        (EXPERTS, (128, 64), 1, "experts.0.gate_proj.weight, which is no part"),
        (EXPERTS, (128, 64), 0, None),  # A layer that is left out.
        ("model.layers.{}.mlp.up_proj.weight", (96, 64), 1, "[96, 64], expected 128 ffn units"),
        ("model.layers.{}.self_attn.q_norm.weight", (64,), 1, None),  # Of all heads together.
        ("model.layers.{}.self_attn.k_norm.weight", (32,), 1, None),  # Of each head.
        ("model.layers.{}.self_attn.q_norm.weight", (63,), 1, "q_norm.weight, which is no part"),
        ("model.layers.{}.self_attn.rotary_emb.inv_freq", (16,), 1, None),
    ],
)
def test_a_teacher_that_cannot_be_made_narrower_is_found_by_its_weights(
    run_file: Path, tmp_path: Path, name: str, shape: tuple[int, ...], layer: int, words: str | None
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "odd"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors") | {name.format(layer): torch.zeros(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = [
        problem
        for problem in problems(run_file, f"teacher.model={folder}", "student.ffn_size=64")
        if problem.startswith("student.ffn_size")
    ]
    assert len(found) == (words is not None), found
    assert words is None or words in found[0]


def test_balanced_experts_of_a_student_that_has_some_are_accepted(
    run_file: Path, tmp_path: Path
) -> None:
    student = make_model(tmp_path / "student", num_local_experts=4, num_experts_per_tok=2)
    overrides = [*STUDENT, f"student.model={student}", "objective={jsd: 1, router_balance: 0.1}"]
    assert problems(run_file, *overrides) == []


def test_logits_may_be_scaled_and_capped(run_file: Path, tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "student", final_logit_softcapping=30.0, logit_scale=0.0625, logits_scaling=8
    )
    assert problems(run_file, *STUDENT, f"student.model={folder}") == []


def test_folders_without_weights_or_configuration_are_refused(
    run_file: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors" in only(run_file, *STUDENT, f"student.model={folder}")
    (folder / "config.json").unlink()
    assert "has no config.json" in only(run_file, f"teacher.model={folder}")


HIDDEN = "signal.kind=hidden"


def test_a_hidden_signal_of_the_tiny_teacher_is_accepted(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(run_file, HIDDEN, "objective={jsd: 1, temperature: 2}") == []
    usage = shutil.disk_usage("/")._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    many = ["teacher.sampling.max_tokens=1000000", "evaluation.held_out_sources=[]"]
    (notice,) = (n for n in check_run_file(str(run_file), [HIDDEN, *many]).notices if "GiB" in n)
    # 12 rows of 1e6 tokens of 64 components of 2 bytes, and 6.1 bytes for the drawn id.
    assert f"up to {12e6 * (2 * 64 + 6.1) / 2**30:.1f} GiB" in notice


def test_the_bound_of_captured_hidden_states_is_told(run_file: Path) -> None:
    def told(*changes: str) -> list[str]:
        notices = check_run_file(str(run_file), list(changes)).notices
        return [notice for notice in notices if "of hidden states" in notice]

    asked = ["teacher.sampling.max_tokens=100000", "teacher.max_num_seqs=64"]
    assert told(*asked) == []
    # 2 * 64 bytes a token are 2,048 tokens a block of 256 KiB: 49 blocks, and one of the next row.
    (notice,) = told(HIDDEN, *asked)
    assert f"at most {64 * 50 * 256 * 1024 / 1e9:.2f} GB of hidden states" in notice
    assert "(64 rows of 100,000 tokens at a width of 64)" in notice
    (on_gpu,) = told(HIDDEN, *asked, "teacher.gpus_per_replica=1")
    assert f"at most {(64 * 50 * 256 * 1024 + (128 << 20)) / 1e9:.2f} GB" in on_gpu


def test_the_synthetic_engine_has_no_hidden_states(run_file: Path) -> None:
    problem = only(run_file, HIDDEN, "teacher.engine=synthetic")
    assert problem.startswith("signal.kind: is 'hidden', but the synthetic engine")
    assert "set teacher.engine: vllm, or signal.kind: topk" in problem


def teacher_with(path: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> str:
    """The tiny teacher with some of its configuration, and maybe its embeddings, replaced."""
    from safetensors.numpy import save_file

    shutil.copytree(TINY, path)
    settings = json.loads((path / "config.json").read_text()) | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (path / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        rest = {
            name: np.zeros(entry["shape"], np.float16)
            for name, entry in header_of(TINY / "model.safetensors").items()
            if "embed_tokens" not in name and name not in tensors
        }
        save_file(rest | tensors, path / "model.safetensors")
    return f"teacher.model={path}"


def test_a_teacher_whose_head_the_student_cannot_use_is_refused_with_the_remedy(
    run_file: Path, tmp_path: Path
) -> None:
    head, lacks = np.zeros((49152, 64), np.float16), "has no embed_tokens.weight"
    cases = {
        "names no hidden_size": ({"hidden_size": None}, None),
        "it would have [49152, 96]": ({"hidden_size": 96}, None),
        "of [49152, 64], but by its config.json it would have [49000, 64]": (
            {"vocab_size": 49000},
            None,
        ),
        "has 0 output heads": ({}, {"model.norm.weight": head[0]}),
        "quantised output head (lm_head.qweight)": ({}, {"lm_head.qweight": head.astype("i4")}),
        "logit_scale is 0": ({"logit_scale": 0}, {"lm_head.weight": head}),
    }
    for number, (words, (config, tensors)) in enumerate(cases.items()):
        override = teacher_with(tmp_path / str(number), config, tensors)
        reported = problems(run_file, HIDDEN, override)
        of_model = [problem for problem in reported if problem.startswith("teacher.model: ")]
        assert any(words in problem for problem in of_model), (words, reported)
        assert words == "logit_scale is 0" or "signal.kind: topk" in of_model[0]
        if "it would have" in words:  # Its weights fit its config.json for no signal.
            continue
        others = [one for one in problems(run_file, override) if one.startswith("teacher.model")]
        assert not [one for one in others if lacks not in one], "other signals need no head there"
    padded = teacher_with(tmp_path / "padded", {}, {"lm_head.weight": head})
    assert [one for one in problems(run_file, HIDDEN, padded) if lacks not in one] == []


def test_stop_strings_of_the_model_are_refused(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TINY, folder)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"stop_strings": ["END"]}))
    assert "['END']" in only(run_file, f"teacher.model={folder}")
    override = "teacher.sampling.stop_token_ids=[2]"
    assert problems(run_file, f"teacher.model={folder}", override) == []


def begin_run(run_file: Path) -> RunFolder:
    checked: Checked = check_run_file(str(run_file))
    assert checked.folder is not None
    assert checked.config is not None
    assert checked.prepared is not None
    checked.folder.ensure()
    checked.folder.write_text(CONFIG, config_text(checked.config))
    tables = checked.prepared.tables.with_keys("t", "float32", None, {})
    tables.write(checked.folder, group_rows=2)
    return checked.folder


def test_a_run_folder_of_another_configuration_is_refused(run_file: Path) -> None:
    begin_run(run_file)
    assert problems(run_file) == []
    assert problems(run_file, "training.num_workers=2", "evaluation.every_steps=3") == []
    problem = only(run_file, "training.rows_per_step=2", "seed=9")
    assert "seed was 0, is 9" in problem
    assert "training.rows_per_step was 4, is 2" in problem


def test_a_folder_that_is_no_run_folder_is_refused(run_file: Path, tmp_path: Path) -> None:
    assert "is no run folder, but has" in only(run_file, f"output.path={tmp_path}")


def test_a_run_whose_prompts_changed_is_refused(run_file: Path, tmp_path: Path) -> None:
    folder = begin_run(run_file)
    assert folder.exists(TRAIN_PROMPTS)
    with (tmp_path / "prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "one more", "source": "a"}))
    assert "(6 rows, now 7)" in only(run_file)


def test_a_run_whose_template_printed_another_day_is_resumed_with_that_day(
    run_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TINY, folder)
    template = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    settings = yaml.safe_load(run_file.read_text())
    settings["teacher"]["model"] = str(folder)
    settings["prompts"]["template_date"] = "2031-12-31"
    run_file.write_text(yaml.safe_dump(settings))
    begin_run(run_file)
    assert problems(run_file) == []
    problem = only(run_file, "prompts.template_date=null")
    assert "set prompts.template_date to the day of the first start" in problem
    assert f"is of {date.today()}), else restore the files" in problem
    assert problems(run_file, "prompts.template_date=2031-12-31") == []
    with (tmp_path / "prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "one more", "source": "a"}))
    assert "template_date" not in only(run_file)


def test_too_little_space_is_a_problem(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "will need about" in only(run_file)
    notices = check_run_file(str(run_file)).notices
    assert any("the teacher's answers may take up to" in notice for notice in notices)


def test_what_a_run_has_written_need_not_be_free_again(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin_run(run_file)
    needed = check_run_file(str(run_file)).prepared.space_needed_bytes  # type: ignore[union-attr]
    assert needed is not None
    usage = shutil.disk_usage("/")._replace(free=needed - 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "will need about" in only(run_file)
    folder.write_bytes("checkpoints/checkpoint_1/rank_0.safetensors", bytes(1500))
    folder.write_bytes("student/model.safetensors", bytes(1400))
    assert "GiB more" in only(run_file)
    folder.write_bytes("held_out.parquet", bytes(200))
    assert problems(run_file) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert "will need about" in only(run_file)
    folder.write_bytes("checkpoints/checkpoint_2/rank_0.safetensors", bytes(needed))
    assert problems(run_file) == [], "never less than nothing"


def test_one_number_changed_in_the_teacher_makes_every_key_new(
    run_file: Path, tmp_path: Path
) -> None:
    def keys(*overrides: str) -> set[bytes]:
        prepared = check_run_file(str(run_file), overrides).prepared
        assert prepared is not None
        return {*prepared.train["key"].to_pylist(), *prepared.held_out["key"].to_pylist()}

    changed = Path(shutil.copytree(TINY, tmp_path / "changed", symlinks=False))
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    first = keys()
    assert first == keys() and len(first) == 12
    assert not first & keys(f"teacher.model={changed}")


def test_a_hub_model_that_is_nowhere_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = files.find_model("nobody/no-such-model")
    assert result.problem is not None
    assert "HF_HUB_OFFLINE" in result.problem
    assert files.find_model("/nowhere/model").problem is not None


def test_the_context_of_a_model_is_read_from_its_configuration(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config: dict[str, Any] = {"max_position_embeddings": 32768, "rope_scaling": yarn}
    folder = make_model(tmp_path / "m", **config)
    assert files.ModelFolder("m", folder).context_tokens == 131072


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_the_prompts_are_read(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert problems(run_file) == []
    assert terminal.getvalue() == "", "nothing for a check that takes no time"
    monkeypatch.setattr(console, "BAR_AFTER_S", 0.0)
    assert problems(run_file) == []
    text = terminal.getvalue()
    assert "tokenising prompts" in text
    assert "12/12" in text
    assert text.endswith("\x1b[1A\x1b[2K"), "the bar is removed"
    assert capsys.readouterr().out == ""


def test_elsewhere_a_slow_reading_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.time, "monotonic", iter([10.0, 11.9, 12.1, 20.0]).__next__)
    with ReadingProgress() as progress:
        progress("reading prompts", 0, None)
        progress("reading prompts", 1000, None)
        progress("tokenising prompts", 1000, 40000)
        progress("tokenising prompts", 2000, 40000)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "tokenising prompts: 1000 of 40000 so far\n")


API = ["teacher.engine=api", "teacher.api.base_url=https://h/v1", "teacher.api.model=large"]
API += ["terms.teacher_licence=apache-2.0"]


def test_an_api_teacher_is_asked_for_no_more_than_text_and_needs_its_key(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = "\n".join(problems(run_file, *API))
    assert "signal.kind: is 'topk', but an API teacher gives its text alone" in found
    assert "teacher.api.api_key_env: names $OPENAI_API_KEY, which is not set here" in found
    monkeypatch.setenv("OPENAI_API_KEY", "a-planted-key-0f3c")
    text = [*API, "signal.kind=text", "objective={cross_entropy: 1}"]
    assert problems(run_file, *text) == []
    unused, _ = problems(run_file, *text, "teacher.api.top_logprobs=20")
    assert "teacher.api.top_logprobs: is 20, but signal.kind is 'text'" in unused
    told = [*API, "teacher.api.top_logprobs=10", "signal.top_k=10"]
    assert problems(run_file, *told, "evaluation.top_k=10") == []
    (wide,) = problems(run_file, *told, "evaluation.top_k=11")
    assert "evaluation.top_k: is 11, but the service names 10 tokens" in wide
    ids = problems(run_file, *told, "evaluation.top_k=10", "teacher.api.ids=true")
    assert "has both ids and top_logprobs" in "\n".join(ids)


def thinking(folder: Path, template: str) -> Path:
    """The tiny teacher with another chat template."""
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_reasoning_that_cannot_be_kept_or_dropped_is_refused(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-planted-key-0f3c")
    keep, drop = "prompts.reasoning=keep", "prompts.reasoning=drop"
    text = [*API, "signal.kind=text", "objective={cross_entropy: 1}"]
    assert problems(run_file, drop) == problems(run_file, keep) == []
    assert problems(run_file, *text, drop) == []
    assert "no markers for it, neither tokens nor in its chat template" in only(
        run_file, *text, keep
    )
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    thinker = thinking(tmp_path / "thinker", turns + "{# <think></think> #}")
    model = f"teacher.model={thinker}"
    assert problems(run_file, *text, keep, model) == []
    told = [*API, "teacher.api.top_logprobs=10", "signal.top_k=10", "evaluation.top_k=10"]
    assert "'keep', but signal.kind is 'topk'" in only(run_file, *told, keep, model)
    assert problems(run_file, *told, drop, model) == []
    off = "prompts.chat_template_kwargs={enable_thinking: false}"
    assert "has enable_thinking: false" in only(run_file, *text, keep, model, off)
    channels = thinking(tmp_path / "channels", turns + "{# <|channel|>analysis #}")
    gpt_oss = f"teacher.model={channels}"
    assert "in messages of its own, which are not cut off" in only(run_file, gpt_oss, drop)


def test_a_prompt_that_begins_reasoning_which_is_dropped_is_told(
    run_file: Path, tmp_path: Path
) -> None:
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    begun = thinking(tmp_path / "begun", turns + "{{ '<think>\n' }}{# </think> #}")
    model = f"teacher.model={begun}"

    def notices(*more: str) -> str:
        return "\n".join(check_run_file(str(run_file), [model, *more]).notices)

    assert "begins reasoning in each prompt (<think>)" in notices("prompts.reasoning=drop")
    assert "begins reasoning" not in notices("prompts.reasoning=keep") + notices()


def test_what_an_api_teacher_may_cost_is_told_before_it_is_asked(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-planted-key-0f3c")
    text = [*API, "signal.kind=text", "objective={cross_entropy: 1}"]
    text += ["teacher.api.prices={input: 1, output: 2}", "teacher.api.base_url=http://far/v1"]
    checked = check_run_file(str(run_file), text)
    notices = "\n".join(checked.notices)
    costs = r"expected to cost (\S+), if answers have (\S+) tokens .* may cost up to (\S+) \("
    figures = re.search(costs + r"([\d,]+) answers, ([\d,]+) prompt tokens", notices)
    assert figures is not None
    expected, mean, most, rows, prompts = (float(f.replace(",", "")) for f in figures.groups())
    assert expected == pytest.approx((prompts + 2 * rows * mean) / 1e6, rel=1e-3)
    assert most == pytest.approx((prompts + 4 * rows * mean) / 1e6, rel=1e-3)
    assert "no limit is set (teacher.api.max_cost)" in notices
    assert "at 2 a million, prices of an unknown day; nothing cached" in notices
    dated = [*text, "teacher.api.prices.as_of=2026-11-02"]
    notices = "\n".join([notices, *check_run_file(str(run_file), dated).notices])
    assert "prices of 2026-11-02" in notices
    assert "prompts and key can be read on the way to far" in notices
    assert "a-planted-key" not in notices


@pytest.mark.parametrize("made", ["", "store", "store/segments"])
def test_a_store_where_no_hard_link_can_be_made_is_refused_before_anything_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    store = tmp_path / "store"
    assert check_store(str(store)) == ([], [])

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (problem,), _ = check_store(str(store))
    assert problem.where == "store.path"
    assert f"{store} cannot hold a teacher store: {tmp_path / made}: no hard link" in str(problem)
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".raystill")]
    assert left == []


def test_a_check_function_is_imported_before_anything_is_spent(
    run_file: Path, tmp_path: Path
) -> None:
    def said(**check: object) -> list[str]:
        return problems(run_file, f"evaluation.checks={json.dumps([check])}")

    (tmp_path / "good.py").write_text("def check(prompt, answer, row): return True\n")
    (tmp_path / "bad.py").write_text("import os\nos._exit(9)\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    assert said(function="good.py:check") == []
    where = "evaluation.checks.0.function"
    (line,) = said(function="good.py:chekc")
    assert line.startswith(f"{where}: (good.py:chekc) cannot be imported: AttributeError: there is")
    (line,) = said(function="no.py:check")
    assert line.startswith(f"{where}: (no.py:check) cannot be read: No such file or directory;")
    (line,) = said(function="bad.py:check")
    assert "its process ended (exit status 9)" in line
    assert "is empty" in said(function="empty.py:check")[0]
    assert "codec can't decode" in said(function="bytes.py:check")[0]
    assert "No module named 'no_such_package'" in said(function="no_such_package.x:f")[0]
    assert "expected folder/file.py:function" in said(function="check")[0]


def test_a_checks_prompts_and_fields_are_kept_for_it(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("def check(prompt, answer, row): return True\n")
    rows = [
        {"prompt": f"Count to {i}.", "source": "ab"[i % 2], "expected": [i], "odd": "\ud800"}
        for i in range(12)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    without = check_run_file(str(run_file)).prepared
    assert without is not None and without.tables.held_out_fields is None
    checks = 'evaluation.checks=[{"function": "good.py:check"}]'
    prepared = check_run_file(str(run_file), [checks]).prepared
    assert prepared is not None
    kept = prepared.tables.held_out_fields
    assert kept is not None
    asked = prepared.tables.held_out["prompt_ids"].to_pylist()
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert len(kept) == 6
    for ids, one in zip(asked, kept.to_pylist(), strict=True):
        assert one["prompt"] in tokenizer.decode(ids)  # Of the same row.
        columns = json.loads(one["fields"])
        assert columns["prompt"] == one["prompt"] == f"Count to {columns['expected'][0]}."


@pytest.mark.parametrize(
    "wrong",
    [
        'evaluation={"checks": [{"function": "a.py:f"}]}',
        'evaluation={"held_out_rows": 2, "free_running": {"rows": 0}, '
        '"checks": [{"function": "a.py:f"}]}',
    ],
)
def test_checks_without_answers_are_refused(run_file: Path, wrong: str) -> None:
    assert "has checks, but no answers to check; hold rows out" in only(run_file, wrong)


def test_two_checks_of_one_name_are_refused(run_file: Path) -> None:
    twice = 'evaluation.checks=[{"function": "a.py:f"}, {"function": "b.py:f"}]'
    assert "has two named 'f'; give each a name of its own" in only(run_file, twice)
