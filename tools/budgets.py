"""Measure the package against its budgets: sizes of cells, modules and functions, prose, names.

`python tools/budgets.py` prints what is, and what may be; `--against REVISION` adds what was. Lines
are counted without blank ones.
"""

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_BE_LONG = ("Trainer", "RunFacts", "Loop", "CheckpointCallback")
EXPORTED = re.compile(r"#\s*\|\s*exporti?\s*$")
NOT_WRAPPED = re.compile(r"\s*\||.*https?://|\s*(\[.*\]:|!\[|<img\b)")  # tables, URLs, images


@dataclass(frozen=True)
class Found:
    """A number, and where it was found."""

    value: float
    where: str


@dataclass
class Chapter:
    """A notebook in numbers."""

    name: str
    module: str | None = None
    prose: int = 0
    exported: int = 0
    exploring: int = 0
    cells: list[Found] = field(default_factory=list)  # exported ones, but for imports
    in_a_row: int = 0  # the most of them without another code cell between
    text: list[str] = field(default_factory=list)


def count_lines(text: str) -> int:
    """Return the number of lines that are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines())


def name_of(source: str) -> str | None:
    """Return the first definition of a cell, or its first line; None if it only imports."""
    body = ast.parse(source).body
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        return None
    defined = (n.name for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
    return next(defined, source.strip().partition("\n")[0])


def read_chapter(path: Path, root: Path) -> Chapter:
    """Return a notebook in numbers."""
    chapter, row = Chapter(str(path.relative_to(root / "nbs").with_suffix(""))), 0
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        first, _, rest = source.partition("\n")
        if cell["cell_type"] == "markdown":
            chapter.prose += count_lines(source)
            chapter.text += source.splitlines()
        elif module := re.match(r"#\s*\|\s*default_exp\s+(\S+)", first):
            chapter.module = module[1]
        elif EXPORTED.match(first):
            chapter.exported += count_lines(rest)
            if name := name_of(rest):
                chapter.cells.append(Found(count_lines(rest), f"{name} in {chapter.name}"))
                row += 1
                chapter.in_a_row = max(chapter.in_a_row, row)
        elif cell["cell_type"] == "code":
            chapter.exploring += count_lines(source)
            row = 0
    return chapter


def functions_of(path: Path) -> Iterator[Found]:
    """Yield the lines of every function and method in a module."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            yield Found(count_lines(body), f"{node.name} in {path.stem}")


def public_names(path: Path) -> list[str]:
    """Return what is in the `__all__` of a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def long_lines(name: str, lines: Iterable[str]) -> list[str]:
    """Return lines of more than 100 columns that could be wrapped."""
    return [f"{name}: {x[:60]}…" for x in lines if len(x) > 100 and not NOT_WRAPPED.match(x)]


class Tree:
    """The files of a project, measured."""

    def __init__(self, root: Path) -> None:
        paths = sorted((root / "nbs").rglob("*.ipynb"))
        self.chapters = [
            read_chapter(p, root) for p in paths if ".ipynb_checkpoints" not in p.parts
        ]
        self.modules = [c for c in self.chapters if c.module and not c.module.endswith("__init__")]
        self.cells = [cell for chapter in self.chapters for cell in chapter.cells]
        sources = [
            path
            for path in sorted((root / "ununennium").rglob("*.py"))
            if path.name not in ("__init__.py", "_modidx.py")
        ]
        self.functions = [function for path in sources for function in functions_of(path)]
        self.names = [f"{path.stem}.{name}" for path in sources for name in public_names(path)]
        self.long_lines = [x for c in self.chapters for x in long_lines(c.name, c.text)]
        if (contributing := root / "CONTRIBUTING.md").exists():
            lines = contributing.read_text().splitlines()
            self.long_lines += long_lines("CONTRIBUTING", lines)
        self.readme_words = len((root / "README.md").read_text().split())


def is_named(cell: Found) -> bool:
    """Return whether a cell is one of those that may be long."""
    return cell.where.split()[0] in MAY_BE_LONG


def largest(found: Iterable[Found]) -> Found:
    """Return the largest number."""
    return max(found, key=lambda one: one.value, default=Found(0, ""))


def median(found: Iterable[float]) -> Found:
    """Return the median of numbers, found nowhere in particular."""
    return Found(statistics.median(found), "")


def prose_ratio(tree: Tree) -> Found:
    """Return exported lines for a line of prose."""
    exported, prose = (sum(getattr(c, n) for c in tree.chapters) for n in ("exported", "prose"))
    return Found(round(exported / prose, 2), "")


@dataclass(frozen=True)
class Budget:
    """What is measured, and the most that it may be."""

    what: str
    limit: float
    measure: Callable[[Tree], Found]


BUDGETS = (
    Budget(
        "exported lines in a module", 340,
        lambda tree: largest(Found(c.exported, c.name) for c in tree.modules),
    ),
    Budget("… median", 180, lambda tree: median(c.exported for c in tree.modules)),
    Budget(
        "lines in an exported cell", 60,
        lambda tree: largest(cell for cell in tree.cells if not is_named(cell)),
    ),
    Budget(
        f"… of {', '.join(MAY_BE_LONG)}", 180,
        lambda tree: largest(cell for cell in tree.cells if is_named(cell)),
    ),
    Budget("… median", 14, lambda tree: median(cell.value for cell in tree.cells)),
    Budget("lines in a function", 38, lambda tree: largest(tree.functions)),
    Budget(
        "exported cells in a row without an example", 2,
        lambda tree: largest(Found(c.in_a_row, c.name) for c in tree.modules),
    ),
    Budget("exported lines for a line of prose", 4, prose_ratio),
    Budget("public names in all modules", 70, lambda tree: Found(len(tree.names), "")),
    Budget("words in the README", 700, lambda tree: Found(tree.readme_words, "")),
    Budget(
        "lines of prose above 100 columns", 0,
        lambda tree: Found(len(tree.long_lines), ", ".join(tree.long_lines[:1])),
    ),
)  # fmt: skip


def tree_of(revision: str) -> Tree:
    """Return a revision's files, measured."""
    git = ["git", "-C", str(ROOT), "archive", revision]
    archive = subprocess.run(git, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return Tree(Path(folder))


def main(against: str | None) -> None:
    """Print the table."""
    now, before = Tree(ROOT), tree_of(against) if against else None
    print(f"| what | {f'before ({against}) | ' if against else ''}now | target | where |")
    print(f"| --- | {'---: | ' if against else ''}---: | ---: | --- |")
    for budget in BUDGETS:
        found = budget.measure(now)
        was = f"{budget.measure(before).value:g} | " if before else ""
        mark = " !" if found.value > budget.limit else ""
        print(f"| {budget.what} | {was}{found.value:g}{mark} | {budget.limit:g} | {found.where} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="REVISION", help="a commit, a tag or a branch")
    main(parser.parse_args().against)
