"""Names for runs of blocks that a person recognises: `layer1`, `features.3`, `blocks.0-5`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..modules import parent_name


def run_name(blocks: Sequence[str], whole: Collection[str]) -> str:
    """One name for blocks that stand one after the other, or that of the largest module in `whole` that they fill.

    >>> run_name(["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"], whole=())
    'encoder.layer.0-2'
    >>> run_name(["layer1.0", "layer1.1"], whole=["layer1", "layer1.0", "layer1.1"])
    'layer1'
    """
    first, last = (_filled_by(n, whole) for n in (blocks[0], blocks[-1]))
    if first == last:
        return first
    shared = parent_name(first)
    while shared and not last.startswith(f"{shared}."):
        shared = parent_name(shared)
    tail = last[len(shared) + 1 :] if shared else last
    stem, number = re.fullmatch(r"(.*?)(\d*)", tail).groups()
    front = f"{shared}.{stem}" if shared else stem
    return f"{first}-{number}" if number and re.fullmatch(re.escape(front) + r"\d+", first) else f"{first}-{tail}"


def _filled_by(name: str, whole: Collection[str]) -> str:
    while parent_name(name) in whole:
        name = parent_name(name)
    return name


def readable(names: Sequence[str], plain: str) -> list[str]:
    """`names` as a person would say them, each once: a name of numbers only becomes `plain` and its place.

    Fastai numbers the children of a body and keeps a timm network under `0.model`: that is left out where the rest tells.

    >>> readable(["0.4", "0.5"], "stage"), readable(["0.model.layer1", "0.model.layer2"], "stage")
    (['stage1', 'stage2'], ['layer1', 'layer2'])
    """
    names = [f"{plain}{i}" if re.fullmatch(r"[\d.-]*", n) else n for i, n in enumerate(names, 1)]
    short = [re.sub(r"^(\d+\.)+(model\.)?", "", n) for n in names]
    return short if len(set(short)) == len(short) else names
