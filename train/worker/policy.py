"""Publishes the student's weights for its sampler, with the logprobs that prove their arrival.

Rank 0 has the coordinator put the weights into Ray's object store, and own them there: so they
outlast this worker. The sampler pulls them, computes the logprobs of the same tokens, and reports
how far they are from those of this student.

Of a student with adapters the frozen weights are sent once in a life of the worker group, and then
the adapter alone; merged weights each time where the sampler can take no adapter (`served_rank`).

Consumes: the student. Unblocks: the source's credits, once the sampler has loaded the weights.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import save

from raystill.model.adapters import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, served_rank
from raystill.model.files import WEIGHTS_FILE
from raystill.model.sampling import ResolvedSampling
from raystill.run import Run
from raystill.train.batch.batch import collate
from raystill.train.batch.rows import Row
from raystill.train.evaluation.measure import LocalStudent
from raystill.train.student import lora
from raystill.train.student.build import DTYPES
from raystill.train.student.export import ExportSettings, exported_state, save_student
from raystill.train.student.sharding import gathering_passes

PROBE_TOKENS = 48

Tensors = dict[str, torch.Tensor]
Files = dict[str, np.ndarray]
"""Contents by name, uint8: arrays, which Ray passes on without a copy."""


class PolicyPublisher:
    """Publishes versions of one student; every rank has one, and all call `publish`."""

    def __init__(self, run: Run, student: LocalStudent, sampling: ResolvedSampling) -> None:
        self._coordinator = run.coordinator
        self._student = student
        dtype = run.config.policy.dtype or run.config.training.export_dtype
        self._settings = ExportSettings(dtype, student.teacher_folder, sampling)
        self._adapter_alone = served_rank(run.config) is not None
        generator = np.random.default_rng(run.config.section_seeds()["policy"])
        self._probe = generator.integers(0, student.vocab, PROBE_TOKENS).astype(np.int32)

    def publish(self, version: int, restored: bool = False) -> None:
        """Publish the weights after ``version`` finished steps. Collective.

        restored: a life of the worker group begins, with weights that may be older than those
        published last.
        """
        files, small = self.files(restored)
        logprobs = self._probe_logprobs()
        if not self._student.ranks.first:
            return
        weights: dict[str, Any] = {
            "weights": self._hold(files),
            "probe_ids": self._probe,
            "probe_logprobs": logprobs,
            "stop_token_ids": self._settings.sampling.stop_token_ids,
        }
        if restored:
            weights["files"] = self._hold(small)
        ray.get(self._coordinator.publish_policy.remote(version, weights, restored))

    def files(self, restored: bool) -> tuple[Files, Files]:
        """What has changed with a version, and if ``restored`` what stays the same: files by name.

        Together they are the student's folder, or that of the frozen weights and the files of the
        adapter. Collective; on other ranks than the first both are empty.
        """
        first, model = self._student.ranks.first, self._student.module.model
        whole: Tensors = {}
        if restored or not self._adapter_alone:
            whole = self._whole_weights(first)
        adapter = lora.adapter_state(model, first) if self._adapter_alone else {}
        if not first:
            return {}, {}
        same = small_files(model, self._settings, whole) if restored else {}
        if not self._adapter_alone:
            return weights_file(whole), same
        return adapter_files(model, adapter), same | (weights_file(whole) if restored else {})

    def _whole_weights(self, first: bool) -> Tensors:
        """All that the sampler's model has on the host, or what its adapters are added to.
        Collective; on other ranks than the first it is empty.
        """
        model, dtype = self._student.module.model, DTYPES[self._settings.dtype]
        if not self._adapter_alone:
            return exported_state(model, dtype, first)
        frozen = lora.base_state(model, first)
        converted = {id(tensor): tensor.to(dtype) for tensor in frozen.values()}  # Ties stay ties.
        return {name: converted[id(tensor)] for name, tensor in frozen.items()}

    def _hold(self, value: Any) -> list[Any]:
        """A list of one reference: in a list, since a plain one would be read when it is passed."""
        held: list[Any] = ray.get(self._coordinator.hold.remote(value))
        return held

    @torch.no_grad()
    def _probe_logprobs(self) -> np.ndarray:
        """The student's logprob of each probe token but the first, float32, nats."""
        module = self._student.module
        was_training = module.training
        module.eval()
        try:
            row = Row(0, 0, self._probe[:1], self._probe[1:])
            batch = collate([row], "text", self._student.vocab).to(self._student.device)
            with gathering_passes(module):
                parts = [
                    torch.log_softmax(z.float(), dim=1).gather(1, batch.targets[rows][:, None])
                    for rows, z in module.logit_chunks(batch)
                ]
        finally:
            module.train(was_training)
        return torch.cat(parts).squeeze(1).cpu().numpy()


def weights_file(state: Tensors) -> Files:
    """The file of weights."""
    return {WEIGHTS_FILE: np.frombuffer(save(without_ties(state)), np.uint8)}


def adapter_files(model: Any, state: Tensors) -> Files:
    """The two files of an adapter. state: `lora.adapter_state`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        lora.save_adapter(model, state, path, base="")
        names = (ADAPTER_SETTINGS, ADAPTER_WEIGHTS)
        return {name: np.fromfile(path / name, np.uint8) for name in names}


def without_ties(state: Tensors) -> Tensors:
    """The state without the second name of a tensor that has two, as files on disk have it."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.contiguous()
    return kept


def small_files(model: Any, settings: ExportSettings, state: Tensors) -> Files:
    """The files of an exported student, without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student"
        save_student(model, path, settings, dict(state))  # A copy: transformers empties it.
        files = [f for f in path.iterdir() if f.is_file() and ".safetensors" not in f.name]
        return {file.name: np.fromfile(file, np.uint8) for file in files}
