"""The language of answers, by py3langid: a model of 97 languages and 4.6 MB, which is part of the
package. Nothing is downloaded.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import Problem, RunError
from raystill.config.stream import FiltersConfig, LanguageConfig
from raystill.datasets.filters.answers import Answers

LONGEST_TEXT = 20_000
"""Characters of an answer that are read."""
REMEDY = "pip install 'raystill[language]' (in a clone: pip install -e '.[language]')"


def by_language(config: LanguageConfig, answers: Answers) -> NDArray[np.bool_]:
    """Rejects what is probably in a language that is not allowed, [N]; numbers and code pass."""
    classify, _ = identifier()
    told = [classify(text[:LONGEST_TEXT]) for text in answers.texts]
    return np.array(
        [code not in config.allowed and p >= config.min_probability for code, p in told], bool
    )


def check_languages(filters: FiltersConfig) -> Iterator[Problem]:
    """A problem for a filter whose package is not here, or whose languages are not known."""
    for number, rule in enumerate(filters.rules):
        if rule.language is None:
            continue
        where = f"filters.rules.{number}.language"
        if find_spec("py3langid") is None:
            message = f"needs the package py3langid, which is not installed here; {REMEDY}"
            yield Problem(where, message)
            continue
        known = identifier()[1]
        for code in sorted(set(rule.language.allowed) - set(known)):
            message = f"has {code!r}, which is no language of py3langid; use one of "
            yield Problem(f"{where}.allowed", message + ", ".join(sorted(known)))


@lru_cache(maxsize=1)
def identifier() -> tuple[Callable[[str], tuple[str, float]], list[str]]:
    """What tells a text's language and its probability, and all languages that it knows.

    Raises RunError where the package is missing.
    """
    try:
        from py3langid import langid
    except ImportError:
        message = f"a filter needs the package py3langid, which this node does not have; {REMEDY}"
        raise RunError(message) from None
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    return model.classify, list(model.labels)
