"""Imports the four rooms as ``raystill.cluster``, ``.serve``, ``.train`` and ``.datasets``.

The rooms are folders without ``__init__.py`` beside this file. A top-level package named
``datasets`` would shadow Hugging Face's in every worker, so nothing may be imported as
``datasets`` or ``serve``; this module lends the folders its own name instead.
"""

from pathlib import Path

__version__ = "0.1.0"
__path__ = [str(Path(__file__).resolve().parent)]
