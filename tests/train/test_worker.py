"""The student's workers under Ray Train: a run that is stopped, resumed, and measured at its end.

The teacher is a stand-in deployment that answers from the prompt ids; the rest is the real stream,
coordinator, workers and files.
"""

import json
import math
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
import transformers
from ray import serve
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from raystill.base.records import read_lines
from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import ENGINE, PROMPT_SCHEMA, answer_schema, row_schema
from raystill.datasets.rows.signal import Signal, signal_of
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order
from raystill.datasets.stream.spec import StreamSpec
from raystill.train.batch.rows import rows_from_table
from raystill.train.checkpoint.checkpoint import read_snapshot
from raystill.train.checkpoint.ray_register import registered_names
from raystill.train.evaluation.pairs import count_pairs
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student
from raystill.train.student.module import StudentModule
from raystill.train.worker.fit import fit
from tests.support.runs import run_of

pytestmark = [pytest.mark.ray, pytest.mark.faults]

VOCAB, K, NUM_ROWS, NUM_HELD_OUT, ROWS_PER_STEP = 48, 6, 37, 6, 8
TOO_LONG = (4, 17, 18)  # Rows the stand-in cannot answer.
APP = "stand-in"


def answer(prompt_ids, row=None):
    """One answer of the stand-in: from the prompt ids alone."""
    if row in TOO_LONG or (row is None and prompt_ids[0] in TOO_LONG):
        return {"response_ids": [], "finish_reason": "", "error": "too_long"}
    rng = np.random.default_rng(list(prompt_ids))
    size = int(rng.integers(1, 6))
    p = rng.dirichlet(np.full(VOCAB, 0.2), size=size)
    ids = np.argsort(-p, axis=1)[:, :K]
    top = np.take_along_axis(p, ids, axis=1)
    response = [int(rng.choice(VOCAB, p=q)) for q in p]
    return {
        "response_ids": response,
        "finish_reason": "stop",
        "error": None,
        "sampled_logprobs": np.log(p[np.arange(size), response]).tolist(),
        "topk_ids": ids.tolist(),
        "topk_logprobs": np.log(top).tolist(),
        "tail_logprob": np.log1p(-top.sum(axis=1)).tolist(),
    }


def prompt_of(row):
    """Prompt ids of a row; the first names it, so that the stand-in knows whom it refuses."""
    return [row, 1 + row % 7, 3]


def answers_table(prompts):
    """``answer_schema`` rows for lists of prompt ids."""
    schema = answer_schema(Signal("topk", K))
    answers = [answer(prompt) for prompt in prompts]
    empty = {"response_ids": [], "finish_reason": ""}
    columns = {
        field.name: [a.get(field.name, empty.get(field.name, [])) for a in answers]
        for field in schema
    }
    return pa.table(columns, schema=schema)


class StandIn:
    """Answers as the teacher does, in a set time."""

    def __init__(self, delay_s):
        self.delay_s = delay_s

    def sample(self, prompts, signal):
        time.sleep(self.delay_s)
        engine = {"engine": "stand-in", "version": "1", "dtype": "float32", "vocab_size": 1000}
        answers = answers_table(prompts["prompt_ids"].to_pylist())
        return answers.replace_schema_metadata({ENGINE: json.dumps(engine)})


@pytest.fixture(scope="module")
def cluster(ray_serve):
    """The shared local Ray with the stand-in teacher deployed."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deployment = serve.deployment(StandIn, ray_actor_options={"num_cpus": 0})
    serve.run(deployment.bind(0.05), name=APP, route_prefix=None)
    yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder the student is cut from."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def run_config(teacher, order, num_workers, rows_per_step=ROWS_PER_STEP, strategy="ddp"):
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "sampling": {"max_tokens": 6, "temperature": 1.0}},
            "student": {"layers": [1]},
            "prompts": {"path": "unused"},
            "signal": {"top_k": K},
            "stream": {"group_rows": 3, "order": order, "max_drop_fraction": 0.2},
            "training": {
                "rows_per_step": rows_per_step,
                "num_workers": num_workers,
                "strategy": strategy,
                "learning_rate": 0.01,
                "compute_dtype": "float32",  # On a CPU with instructions for bfloat16 too.
                "tokens_per_micro_batch": 16,
                "checkpoint_every_steps": 2,
                "export_dtype": "float32",
            },
            "evaluation": {"held_out_rows": 1, "top_k": K, "free_running": {"rows": 3}},
        }
    )


def write_inputs(folder):
    """What the driver writes before the student starts: prompts, and answered held-out rows."""
    prompts = [prompt_of(row) for row in range(NUM_ROWS)]
    folder.write_table("prompts/train.parquet", prompt_table(prompts))
    held_out = [[40 + i, 5] for i in range(NUM_HELD_OUT)]
    folder.write_table("prompts/held_out.parquet", prompt_table(held_out))
    folder.write_table("held_out.parquet", held_out_table(held_out))


def prompt_table(prompts):
    columns = {
        "row": list(range(len(prompts))),
        "key": [row.to_bytes(16, "big") for row in range(len(prompts))],
        "prompt_ids": prompts,
        "source": ["s"] * len(prompts),
        "response_ids": [None] * len(prompts),
    }
    return pa.table(columns, schema=PROMPT_SCHEMA)


def held_out_table(prompts):
    answers = answers_table(prompts).to_pydict()
    rows = list(range(NUM_HELD_OUT))
    columns = {**answers, "row": rows, "position": rows, "prompt_ids": prompts}
    columns |= {"epoch": [-1] * NUM_HELD_OUT, "source": ["s"] * NUM_HELD_OUT}
    schema = row_schema(Signal("topk", K))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def run_once(config, folder, teacher, name, stop=False, late=False):
    """One driver's life: a coordinator of its own, ``fit`` beside the main thread; its snapshot.

    late: the held-out rows are answered when the student has trained a step.
    """
    coordinator = start_coordinator(name, config.rows_ahead, NUM_ROWS, 0.2)
    if not late:
        ray.get(coordinator.held_out_ready.remote())
    if stop:
        ray.get(coordinator.request_stop.remote(15))
    more = {"num_rows": NUM_ROWS, "coordinator": coordinator}
    run = run_of(config, folder, str(teacher), **more)
    spec = replace(StreamSpec.of(run, signal_of(config.signal, {})), app_name=APP)
    errors = []

    def work():
        try:
            fit(run, spec)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while late and thread.is_alive() and not folder.exists("metrics.jsonl"):
        time.sleep(0.05)
    assert not late or not folder.exists("evaluation.jsonl"), "it waited, and yet it measured"
    ray.get(coordinator.held_out_ready.remote())
    thread.join()
    if errors:
        raise errors[0]
    snapshot = ray.get(coordinator.snapshot.remote())
    ray.kill(coordinator)
    return snapshot


def last_checkpoint(folder):
    return read_snapshot(folder.local / "checkpoints" / max(registered_names(folder)))


def reference_student(config, teacher):
    """The same steps in one process: rows by their position, no Ray, no restart."""
    order = epoch_order(NUM_ROWS, config.section_seeds()["order"], 0, 3)
    schema = row_schema(Signal("topk", K))
    model = build_student(config, str(teacher), config.section_seeds()["student"])
    module = StudentModule(model)
    batches = BatchMaker(config.training, config.objective, signal_kind="topk", student_vocab=VOCAB)
    step = GlobalStep(module, build_optimizer(module, config.training), batches, total_steps=5)
    for index in range(5):
        positions = range(index * ROWS_PER_STEP, min((index + 1) * ROWS_PER_STEP, NUM_ROWS))
        kept = [p for p in positions if order[p] not in TOO_LONG]
        prompts = [prompt_of(int(order[p])) for p in kept]
        columns = {**answers_table(prompts).to_pydict(), "prompt_ids": prompts, "position": kept}
        columns |= {"row": [int(order[p]) for p in kept], "epoch": [0] * len(kept)}
        columns["source"] = ["s"] * len(kept)
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        step.run(index, rows_from_table(table), has_more=True, stop=False)
    return model


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_stopped_run_on_two_workers_resumes_and_trains_what_one_process_would(
    cluster, teacher, tmp_path, first, then
):
    num_files = {"ddp": 1, "fsdp": 2}
    folder = RunFolder(str(tmp_path / "run")).ensure()
    write_inputs(folder)

    config = run_config(teacher, "fixed", num_workers=2, strategy=first)
    stopped = run_once(config, folder, teacher, f"{first}-1", stop=True, late=True)
    (before,) = read_lines(folder, "evaluation.jsonl")
    untrained = build_student(config, str(teacher), config.section_seeds()["student"])
    check_recomputation(folder, before, untrained.eval())
    assert stopped.outcome == "stopped"
    assert last_checkpoint(folder).step == 1  # The step that was begun is finished.
    assert last_checkpoint(folder).num_files == num_files[first]
    assert len(read_lines(folder, "metrics.jsonl")) == 1
    assert not folder.exists("student")
    (folder.local / "checkpoints" / "step-00000099").mkdir()  # Written, but never registered.

    config = run_config(teacher, "fixed", num_workers=2, strategy=then)
    resumed = run_once(config, folder, teacher, f"{first}-2")
    assert not folder.exists("checkpoints/step-00000099")
    assert last_checkpoint(folder).num_files == num_files[then]
    assert len(registered_names(folder)) == config.training.num_checkpoints_to_keep
    check_completed(config, folder, resumed)
    trained = AutoModelForCausalLM.from_pretrained(folder.local / "student").eval()
    check_recomputation(folder, read_lines(folder, "evaluation.jsonl")[-1], trained)
    check_student(config, folder, teacher)


def check_student(config, folder, teacher):
    """The finished student is what one process makes of the same rows."""
    trained = AutoModelForCausalLM.from_pretrained(folder.local / "student")
    expected = dict(reference_student(config, teacher).named_parameters())
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-4, msg=name)


def check_completed(config, folder, snapshot):
    """Every row trained or dropped once, every step recorded once, every file there."""
    assert snapshot.outcome == "completed"
    assert snapshot.dropped == {"too_long": 3}
    assert snapshot.max_rows_ahead_seen <= config.rows_ahead
    final = last_checkpoint(folder)
    ledger = Ledger.from_dict(final.ledger)
    assert ledger.num_trained == NUM_ROWS - 3
    assert len(ledger.missing()) == 0
    lines = read_lines(folder, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, final.step + 1))
    assert sum(line["rows"] for line in lines) == NUM_ROWS - 3
    before, after = read_lines(folder, "evaluation.jsonl")
    assert (before["step"], before["when"]) == (0, "before")
    assert (after["step"], after["when"]) == (final.step, "after")
    assert set(after["baselines"]) == {"uniform", "unigram", "bigram"}
    pairs = count_pairs(run_of(config, folder, num_rows=NUM_ROWS), VOCAB, 0, ledger.dropped)
    assert pairs.arrays()["pair_counts"].sum() == sum(line["tokens"] for line in lines)
    assert len(read_lines(folder, "answers.jsonl")) == 6
    assert (folder.logs / "student-0.log").exists()


def check_recomputation(folder, record, model):
    """The figures again from a model and ``held_out.parquet`` with transformers alone."""
    kl = nll = agree = tokens = 0
    for row in folder.read_table("held_out.parquet").to_pylist():
        ids = row["prompt_ids"] + row["response_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for t, target in enumerate(row["response_ids"]):
            q = logits[len(row["prompt_ids"]) + t - 1].softmax(-1)
            p = np.exp([*row["topk_logprobs"][t], row["tail_logprob"][t]])
            q_parts = [float(q[i]) for i in row["topk_ids"][t]]
            q_parts.append(1 - sum(q_parts))
            kl += sum(a * math.log(a / b) for a, b in zip(p, q_parts, strict=True))
            agree += int(q.argmax()) == row["topk_ids"][t][0]
            nll -= math.log(q[target])
            tokens += 1
    assert record["num_tokens"] == tokens
    assert record["kl_nats_per_token"] == pytest.approx(kl / tokens, rel=1e-4)
    assert record["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert record["top1_agreement"] == pytest.approx(agree / tokens)
