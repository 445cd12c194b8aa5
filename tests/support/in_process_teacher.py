"""The teacher's own engine in this process: samples greedily and scores. Run as a module:

``python -m tests.support.in_process_teacher QUESTIONS.json ANSWERS.pickle``
"""

import asyncio
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from tests.support.end_to_end import TEACHER


async def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """``sampled`` and ``scored`` Answers to ``prompts``; scored: of ``responses``."""
    from raystill.serve.engine.vllm import VllmEngine

    teacher = TeacherConfig.model_validate(asked["teacher"])
    sampling = resolve_sampling(teacher, TEACHER)
    width = asked["width"]
    engine = VllmEngine(EngineSettings(teacher, str(TEACHER), sampling, 1, width, cores=(0,)))
    await engine.start()
    prompts = [np.array(p, np.int32) for p in asked["prompts"]]
    responses = [np.array(r, np.int32) for r in asked["responses"]]
    signal = Signal("topk", width)
    try:
        return {
            "sampled": await engine.sample(prompts, signal),
            "scored": await engine.score(prompts, responses, signal),
            "vocab_size": engine.vocab_size,
        }
    finally:
        engine.close()


if __name__ == "__main__":
    prepare_process((0,))
    found = asyncio.run(answer(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_bytes(pickle.dumps(found))
