"""One figure of a benchmark: printed as it is, and kept for the table of `make bench` where that runs the benchmark."""

import json
import os


def figure(name: str, value: float, limit: float | None = None, *, least: bool = False) -> bool:
    """Tell a figure to `make bench`; returns whether it is within its limit, the most it may be, or with `least` the least."""
    kept = limit is None or (value >= limit if least else value <= limit)
    if path := os.environ.get("FIGURES"):
        with open(path, "a") as file:
            file.write(
                json.dumps({"figure": name, "value": value, "limit": limit, "least": least, "kept": kept}) + "\n"
            )
    return kept
