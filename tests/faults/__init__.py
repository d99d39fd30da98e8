"""What goes wrong on other people's disks, in other processes and at other moments, counted: `make faults`.

Each part is a module with `run(scale, seed) -> list[Row]`: `scale` is 1 for the whole count and less for the quick form in
`tests/test_faults.py`. A fault is tried for real (a flipped bit, a signal, a second process), never a stand-in.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """What was tried, how often, and a sentence for each time that it went wrong."""

    what: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.what}: {self.tried} tried, {len(self.wrong)} wrong" + "".join(
            f"\n    {w}" for w in self.wrong[:5]
        )


def count(whole: int, scale: float) -> int:
    """How many of `whole` trials to make at this scale, at least one."""
    return max(1, round(whole * scale))
