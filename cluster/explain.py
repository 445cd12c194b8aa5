"""The help of the run file: every field with its type, default, sentence and mark."""

import textwrap

from raystill.cluster.describe import fields

HEAD = """\
Fields of a run file. Set any of them on the command line with --set a.b=value.
A change of an [identity] field makes another run: an existing run folder refuses it.
An [operational] field may change between restarts of the same run.
"""


def describe_fields() -> str:
    """One paragraph a field, under its dotted name, in the order of the run file."""
    lines, section = [HEAD], ""
    for field in fields():
        head = field.name.split(".")[0] if "." in field.name else ""
        if head != section:
            section = head
            lines.append(f"{section}:")
        lines.append(f"  {field.name}  ({field.type}; default: {field.default}) [{field.kind}]")
        lines.append(textwrap.indent(textwrap.fill(field.sentence, 86), " " * 6))
    return "\n".join(lines) + "\n"
