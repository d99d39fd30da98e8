"""timm's names, by its source: importing it takes longer than importing torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def timm_names() -> tuple[str, ...]:
    """What `timm.list_models()` returns, read and not imported, with the former names that it still takes.

    A model is a function below `@register_model`. Empty where timm is not installed.
    """
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return ()
    files = sorted((Path(spec.origin).parent / "models").rglob("*.py"))
    texts = [f.read_text(encoding="utf-8") for f in files]
    names = {name for text in texts for name in _REGISTERED.findall(text)}
    former = {name for text in texts for block in _FORMER.findall(text) for name in _KEY.findall(block)}
    return tuple(sorted(names | former))


_REGISTERED = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)", re.MULTILINE)
_FORMER = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"^\s+['\"](\w+)['\"]\s*:", re.MULTILINE)
