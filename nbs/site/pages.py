"""The pages of the site that follow from what is there already: the README, the public names, the table of networks.

mkdocs calls the two functions below. A fact stands in one place: the start page is README.md, the reference is the sections of
`lib/fasthaw/__init__.py` with the docstrings, the manual is every notebook of `nbs/`.
"""

import csv
import html
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import fasthaw

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "nbs" / "networks.csv"  # make architectures ARGS="--table nbs/networks.csv"
ADAPTERS = {
    "fasthaw.adapters.lightning.HoldFrozen": "Lightning",
    "fasthaw.adapters.transformers.HoldFrozen": "Transformers",
}


def on_config(config: MkDocsConfig) -> None:
    """The manual has every notebook, the reference every section of public names."""
    manual = [{_title(p): p.name} for p in sorted((ROOT / "nbs").glob("*.ipynb"))]
    reference = [{title: f"reference/{_slug(title)}.md"} for title in sections()]
    for entry in config.nav:
        for title, empty in {"Manual": manual, "Reference": reference}.items():
            if isinstance(entry, dict) and title in entry:
                entry[title] = empty


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Pages that no file below `nbs/` is."""
    pages = {
        "index.md": linked((ROOT / "README.md").read_text()),
        "changelog.md": linked((ROOT / "CHANGELOG.md").read_text()),
        "contributing.md": linked((ROOT / "CONTRIBUTING.md").read_text()),
        "networks.md": networks(),
        **{f"reference/{_slug(title)}.md": reference(title, names) for title, names in sections().items()},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def linked(text: str) -> str:
    """A page of the repository with links that hold on the site."""
    text = text.replace("](nbs/", "](").replace("](CHANGELOG.md", "](changelog.md")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](README.md", "](index.md")


def sections() -> dict[str, list[str]]:
    """The public names by the comments between them, in reading order."""
    text = (ROOT / "lib/fasthaw/__init__.py").read_text()
    (block,) = re.findall(r"^_WHERE = \{\n(.*?)^\}", text, re.M | re.S)
    found: dict[str, list[str]] = {}
    for line in block.splitlines():
        if comment := re.match(r"    # (.+)", line):
            found[comment[1][0].upper() + comment[1][1:]] = names = []
        else:
            names.append(_place(re.match(r'    "(\w+)"', line)[1]))
    return {**found, "Adapters": [*ADAPTERS]}


def _place(name: str) -> str:
    """Where a public name is defined: `fasthaw.preview` alone could be the module of that name."""
    thing = getattr(fasthaw, name)
    module = getattr(thing, "__module__", "") if hasattr(thing, "__qualname__") else ""
    return f"{module or f'fasthaw.{fasthaw._WHERE[name]}'}.{name}"


def reference(title: str, names: list[str]) -> str:
    """A page of the reference."""
    heading = {n: f"\n    options: {{heading: '{ADAPTERS[n]}: HoldFrozen'}}" if n in ADAPTERS else "" for n in names}
    return f"# {title}\n\n" + "\n\n".join(f"::: {n}{heading[n]}" for n in names) + "\n"


def networks() -> str:
    """The checked networks as a table with a field to search in."""
    if not TABLE.exists():
        return (
            "# Checked networks\n\n`make architectures` looks at the layer groups of every network of torchvision and timm "
            "and of some of Transformers and fastai. Its table is not part of this build.\n"
        )
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"network", "groups", "head", "parameters"} <= rows[0].keys():
        raise PluginError(f"{TABLE} is not the table of `make architectures`")
    well = sum(r.get("verdict") == "ok" for r in rows)
    body = "\n".join(
        f"<tr><td>{html.escape(r['network'])}</td><td>{html.escape(_names(r['groups']))}</td>"
        f"<td>{html.escape(r['head'])}</td><td>{int(r['parameters']):,}</td></tr>"
        for r in rows
    )
    return (
        f"# Checked networks\n\n`make architectures` looks at the groups that `split_stages()` makes of each: every parameter "
        f"in one group, in the order in which layers run, the classifier last. It finds nothing wrong with {well:,} of "
        f"{len(rows):,}.\n\n"
        '<input class="search-networks" type="search" placeholder="resnet, timm:vit, Bert" aria-label="Search the table">\n'
        '<p class="found-networks" aria-live="polite"></p>\n\n'
        '<table class="networks">\n<thead><tr><th>network</th><th>groups</th><th>head</th><th>parameters</th></tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n"
    )


def _names(groups: str) -> str:
    """Names of the groups, how many there are first; the table has each with its parameters."""
    names = [group.rpartition(" ")[0] for group in groups.split(", ")]
    return f"{len(names)}: {', '.join(names)}"


def _title(path: Path) -> str:
    """The first heading of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    text = "".join(next(c["source"] for c in cells if c["cell_type"] == "markdown"))
    return re.search(r"^# (.+)", text, re.M)[1].replace("`", "")


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
