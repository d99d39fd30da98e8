"""Python's own: what the steps of compiled code are called, which changes with every version."""

from __future__ import annotations

import dis


def loads_variable(step: dis.Instruction) -> str | None:
    """The variable that this step loads, local or global; None where it does something else."""
    if not step.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST")):
        return None
    # From Python 3.13 on one instruction may load two variables; the second is what an attribute is taken of.
    return step.argval[-1] if isinstance(step.argval, tuple) else step.argval


def loads_attribute(step: dis.Instruction) -> str | None:
    """The attribute that this step takes of what was loaded before, a method too; None where it does something else."""
    is_one = step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
    return step.argval if is_one else None


def multiplies(step: dis.Instruction) -> bool:
    """Whether this step is `*` or `*=`; each was an instruction of its own before Python 3.11."""
    return step.opname in ("BINARY_MULTIPLY", "INPLACE_MULTIPLY") or (
        step.opname == "BINARY_OP" and step.argrepr in ("*", "*=")
    )
