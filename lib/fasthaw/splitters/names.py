"""Names for runs of blocks that a person recognises: `layer1`, `features.3`, `blocks.0-5`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..modules import parent_name
from .tree import Node


def names_of_groups(
    tree: Node, blocks: Sequence[Sequence[str]], groups: Sequence[Sequence[str]], head: bool, plain: str
) -> list[str]:
    """A name for each of `groups`, which are leaves, after the blocks in it; without blocks it is the stem.

    `head`: one more group comes last, `head`; `plain` is what a group is called whose blocks have numbers only.
    """
    alone = bool(blocks) and not blocks[0]
    taken = {n for n, there in (("stem", alone), ("head", head)) if there}
    filled = _filled(tree, groups)
    names = [run_name(names, whole - taken) for names, whole in zip(blocks, filled, strict=True) if names]
    return [*["stem"] * alone, *readable(names, plain), *["head"] * head]


def _filled(tree: Node, groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """For each group, the names of the modules all of whose leaves are in it."""
    place = {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}
    filled: list[set[str]] = [set() for _ in groups]
    for node in tree.walk():
        inside = {place.get(leaf, -1) for leaf in node.leaves}
        if len(inside) == 1 and -1 not in inside and node.name:
            filled[inside.pop()].add(node.name)
    return filled


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
    number = re.sub(r".*\D", "", tail)
    stem = tail[: len(tail) - len(number)]
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
