"""A filter's function: whether an answer gives the result that its reference gives, by algebra.

math-verify reads LaTeX and plain numbers, the last box first, and compares by SymPy: expressions,
equations, sets, intervals, units. It is to be installed on every node:
``pip install 'math-verify[antlr4_13_2]'``.

    filters:
      - function: {path: examples/filters/maths.py:agrees, columns: [answer], timeout_s: 10}

Source: https://github.com/huggingface/Math-Verify (Apache-2.0).
"""

from typing import Any

from math_verify import parse, verify


def agrees(row: dict[str, Any]) -> bool:
    """Whether the response's last result equals the field ``answer``, LaTeX or a number.

    The library's own time limits are off: the filter has one, and it holds for all of a call. A
    reference that is missing, or has no result that can be read, agrees with nothing.
    """
    if row["columns"]["answer"] is None:
        return False
    reference = str(row["columns"]["answer"])
    if "$" not in reference and "\\boxed" not in reference:
        reference = f"${reference}$"
    meant = parse(reference, parsing_timeout=None)
    said = parse(row["response"], parsing_timeout=None)
    return bool(meant) and bool(verify(meant, said, timeout_seconds=None))
