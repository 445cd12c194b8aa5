"""Raystill: distils a large language model into a small one on a Ray cluster.

This package folder holds the ground floor (``base``, ``config``, ``model``, ``placement``) and
links to the four rooms beside it, ``cluster``, ``serve``, ``datasets`` and ``train``. The rooms
are imported as ``raystill.<room>`` only: a top-level package named ``datasets`` would shadow
Hugging Face's in every worker.
"""

import os

# Xet, by which huggingface_hub fetches and sends large files, reports each transfer otherwise.
os.environ.setdefault("HF_XET_TELEMETRY_ENABLED", "0")

__version__ = "0.1.0"
