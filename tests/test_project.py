"""The rules of the project: what is imported, generated, tested and shipped, and how large."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from small import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import budgets

PACKAGE = sorted((ROOT / "ununennium").rglob("*.py"))
MODULES = [path for path in PACKAGE if path.stem not in ("__init__", "_modidx")]
PROMISES = sorted((ROOT / "tests" / "promises").glob("test_*.py"))
NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_trainer_loads_no_display():
    code = "import sys, ununennium.training, ununennium; print(*sys.modules)"
    modules = set(run(sys.executable, "-c", code).split())
    displays = {"ipywidgets", "plotly", "IPython", "matplotlib"}
    assert not modules & (displays | {"nbdev", "fastcore"})


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.stem)
def test_no_star_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names))


def reading_order():
    """Return the modules in the order in which their notebooks are read: by folder and number."""
    folders = [ROOT / "nbs", ROOT / "nbs" / "notebook", ROOT / "nbs" / "training"]
    modules = []
    for path in [path for folder in folders for path in sorted(folder.glob("*.ipynb"))]:
        exported = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
        if exported and not exported[1].endswith("__init__"):
            modules.append(exported[1])
    return modules


def imports_of(module):
    """Return the modules of the package that a module imports when it is imported."""
    path = ROOT / "ununennium" / (module.replace(".", "/") + ".py")
    package = ["ununennium", *module.split(".")[:-1]]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found.add(".".join([*base, *(node.module or "").split(".")]))
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {n.removeprefix("ununennium.") for n in found if n.startswith("ununennium")}


@pytest.mark.parametrize("module", reading_order())
def test_a_chapter_imports_only_earlier_chapters(module):
    order = reading_order()
    assert imports_of(module) <= set(order[: order.index(module)])


def test_every_module_has_a_chapter():
    modules = {
        ".".join(path.relative_to(ROOT / "ununennium").with_suffix("").parts)
        for path in PACKAGE
        if path.stem not in ("__init__", "_modidx")
    }
    assert modules == set(reading_order())


def test_package_and_notebooks_agree(tmp_path):
    """Delete what is generated, clean, export: nothing may differ."""
    for name in ("nbs", "ununennium", "settings.ini", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb*")
            )
        else:
            shutil.copy(source, tmp_path)
    for path in (tmp_path / "ununennium").rglob("*.py"):
        path.unlink()
    scripts = Path(sys.executable).parent
    run(scripts / "nbdev_clean", cwd=tmp_path)
    run(scripts / "nbdev_export", cwd=tmp_path)
    for path in [*PACKAGE, *NOTEBOOKS]:
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), path
    made = {p.relative_to(tmp_path) for p in (tmp_path / "ununennium").rglob("*.py")}
    assert made == {p.relative_to(ROOT) for p in PACKAGE}


def test_the_readme_is_the_index_notebook():
    from readme import render

    text, pictures = render(ROOT / "nbs" / "index.ipynb")
    assert (ROOT / "README.md").read_text() == text
    assert {p.name for p in (ROOT / "README_files").iterdir()} == {
        Path(name).name for name in pictures
    }
    for name, content in pictures.items():
        assert (ROOT / name).read_bytes() == content


def links_of(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", text)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS], ids=lambda p: p.stem
)
def test_links_lead_somewhere(path):
    for link in links_of(path):
        assert (path.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_as_chapters(path):
    """A title, a subtitle, prose, no stored errors."""
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert re.match(r"# .+\n\n> .+", first)
    prose = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    assert prose > 15
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not any(output["output_type"] == "error" for output in cell["outputs"])


def test_public_names_have_docstrings_with_their_parameters():
    import inspect

    import ununennium

    for name in ununennium.__all__:
        thing = getattr(ununennium, name)
        assert inspect.getdoc(thing), name
        if isinstance(thing, type) and issubclass(thing, Exception):
            continue
        for parameter in inspect.signature(thing).parameters:
            described = rf"^(\w+, )*{parameter}(, \w+)*$"
            assert re.search(described, inspect.getdoc(thing), re.M), (name, parameter)


def test_versions_agree():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    import ununennium

    assert ununennium.__version__ == settings["DEFAULT"]["version"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_stay_small(path):
    """The saved state of a chart would bring all of plotly's JavaScript with it."""
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert path.stat().st_size < 1_000_000


# The tests.


def folder_and_name(path, root):
    """Return where a module's tests are: `training/loop.py` has `training/test_loop.py`."""
    relative = path.relative_to(root)
    return (relative.parent / f"test_{relative.name}").as_posix()


def test_every_module_has_its_tests():
    tests, own = ROOT / "tests", {"test_project.py", "test_golden.py"}
    expected = {folder_and_name(path, ROOT / "ununennium") for path in MODULES}
    mirrored = [tests, *(tests / part for part in ("training", "notebook"))]
    found = {
        path.relative_to(tests).as_posix() for folder in mirrored for path in folder.glob("test_*")
    }
    assert found - own == expected


def promises():
    """Return number, title and file of each section of the chapter."""
    cells = json.loads((ROOT / "nbs" / "promises.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    sections = re.findall(r"^## (\d+) · (.+)\n([^#]+)", text, re.MULTILINE)
    return [
        (int(number), title, re.findall(r"\btest_\d\d_\w+\.py\b", rest))
        for number, title, rest in sections
    ]


def test_the_promises_are_numbered_from_zero():
    numbers = [number for number, _, _ in promises()]
    assert numbers == list(range(len(numbers))) and len(numbers) > 10
    named = sorted(file for _, _, files in promises() for file in files)
    assert named == sorted(path.name for path in PROMISES)


@pytest.mark.parametrize(("number", "title", "files"), promises())
def test_a_promise_and_its_tests_agree(number, title, files):
    (file,) = files
    assert file.startswith(f"test_{number:02d}_")
    doc = ast.get_docstring(ast.parse((ROOT / "tests" / "promises" / file).read_text()))
    assert doc is not None and re.match(rf"{number} · {re.escape(title)}[.:]", doc)


@pytest.mark.parametrize("path", PROMISES, ids=lambda p: p.stem)
def test_promises_are_tested_through_public_names(path):
    """The names of the package itself, no private ones, and hardly ever the parts of a run."""
    import ununennium

    tree = ast.parse(path.read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imported:
        for alias in node.names:
            source = getattr(node, "module", None) or alias.name
            if source.startswith("ununennium"):
                assert source == "ununennium" and alias.name in ununennium.__all__, alias.name
    private = [unparsed for _, unparsed in private_accesses(tree)]
    assert not private
    parts = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "run"]
    subprocesses = sum(ast.unparse(n) == "subprocess.run" for n in parts)
    assert len(parts) - subprocesses <= (5 if path.stem == "test_03_precision" else 0)


# The code.

# Private names of other libraries that have no public counterpart.
BORROWED = {
    "_BatchNorm": "PyTorch: the base class of all batch norms",
    "_static_graph_delay_allreduce_enqueued": "PyTorch: whether DDP has recorded a static graph",
    "_buffers": "PyTorch: buffers of one module, where assigning replaces them",
    "_foreach_copy_": "PyTorch: one kernel for many tensors",
    "_foreach_mul_": "PyTorch: one kernel for many tensors",
    "_foreach_norm": "PyTorch: one kernel for many tensors",
    "_get_default_store": "PyTorch: the store of the process group",
    "_iterator": "PyTorch: the persistent workers of a DataLoader",
    "_orig_mod": "PyTorch: the model inside a compiled one",
    "_milestones": "PyTorch: where the parts of a SequentialLR start",
    "_schedulers": "PyTorch: the parts of a SequentialLR or ChainedScheduler",
    "_version": "PyTorch: how often a tensor was changed in place",
    "_step_supports_amp_scaling": "PyTorch: a fused optimizer that skips by itself",
    "_publish_status": "ipykernel: busy and idle",
    "_recv_callback": "pyzmq: what handles a message of a stream",
    "_shell_channel_to_main": "ipykernel: the route from a subshell",
    "_config": "plotly: the options of the mode bar",
    "_esm": "plotly: the JavaScript of a widget",
    "_exit": "Python: end a process at once",
    "_fields": "Python: what makes a tuple a named one",
    "_getframe": "Python: the caller, for warnings",
    "_repr_html_": "IPython: how an object is shown",
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_accesses(tree):
    """Yield private names that are read from another object or module, with the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name):
                yield name, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.name, ast.unparse(node)) for a in node.names if is_private(a.name))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_nothing_private_is_used_across_objects(path):
    found = {name: code for name, code in private_accesses(ast.parse(path.read_text()))}
    assert found.keys() <= BORROWED.keys(), found


def test_private_names_are_borrowed_only_where_needed_and_from_others():
    trees = [ast.parse(path.read_text()) for path in MODULES]
    definitions = (ast.FunctionDef, ast.ClassDef)
    own = {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, definitions)}
    assert own & BORROWED.keys() == {"_repr_html_"}
    assert {name for tree in trees for name, _ in private_accesses(tree)} == BORROWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_displays_and_the_check_print(path):
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    prints = [ast.unparse(n) for n in calls if ast.unparse(n.func) == "print"]
    if path.stem == "hooks":  # the base class of all displays
        assert prints == ["print(text, flush=True)"]
    elif path.stem not in ("progress", "dashboard", "check"):
        assert not prints


# Budgets.


@pytest.fixture(scope="module")
def tree():
    return budgets.Tree(ROOT)


@pytest.mark.parametrize("budget", budgets.BUDGETS, ids=lambda budget: budget.what)
def test_budgets_are_kept(budget, tree):
    found = budget.measure(tree)
    assert found.value <= budget.limit, f"{budget.what}: {found.value:g} {found.where}"


def test_contributing_quotes_the_budgets():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for budget in budgets.BUDGETS:
        assert f"| {budget.what} | {budget.limit:g} |" in text, budget.what


# What is shipped.


@pytest.mark.slow
def test_the_wheel_installs_and_imports_in_a_bare_environment(tmp_path):
    """Built from the sdist, so that what it lacks is missed; torch and numpy are borrowed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "_demo", "__pycache__", "*.egg-info", "build", "dist"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source, env=environment)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", wheel, env=environment)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    import numpy
    import torch

    requires = "import importlib.metadata as m; print(*m.requires('ununennium'))"
    wanted = run(python, "-c", requires, env=environment)
    assert {"torch", "numpy", "tqdm"} <= set(re.findall(r"\b[a-z]+\b", wanted))
    paths = {str(Path(module.__file__).parents[1]) for module in (torch, numpy)}
    code = (
        "import ununennium, ununennium.training, sys; from ununennium import Trainer;"
        f"assert ununennium.__file__.startswith({str(tmp_path)!r}), ununennium.__file__;"
        "import pathlib; assert (pathlib.Path(ununennium.__file__).parent / 'py.typed').exists();"
        "assert not {'ipywidgets', 'plotly', 'IPython', 'nbdev'} & set(sys.modules);"
        "print(ununennium.__version__)"
    )
    # Behind the bare environment's own packages, so that the wheel is what is imported.
    append = f"import sys; sys.path += {sorted(paths)!r};"
    print(run(python, "-c", append + code, cwd=tmp_path, env=environment))
