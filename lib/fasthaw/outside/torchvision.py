"""torchvision's names, by its source: importing it takes as long as importing torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def model_names() -> tuple[str, ...]:
    """What `torchvision.models.list_models()` returns, read and not imported: a typo is answered without the wait.

    A model is a function below `@register_model()` or `@register_model(name="...")`; other decorators may be in between.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed", name="torchvision")
    files = sorted((Path(spec.origin).parent / "models").rglob("*.py"))
    found = [m for f in files for m in _REGISTERED.finditer(f.read_text(encoding="utf-8"))]
    return tuple(sorted(m["name"] or m["function"] for m in found))


_REGISTERED = re.compile(
    r'^@register_model\((?:name="(?P<name>\w+)")?\)\n(?:@.*\n|[ )].*\n)*^def (?P<function>\w+)', re.MULTILINE
)
