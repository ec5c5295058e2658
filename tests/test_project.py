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


PACKAGE = sorted((ROOT / "ununennium").rglob("*.py"))


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


NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


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


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for link in links_of(path):
        assert (path.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_as_chapters(path):
    """A title, a subtitle, prose, no stored errors; an exported cell is never a whole module."""
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert re.match(r"# .+\n\n> .+", first)
    prose = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    assert prose > 15
    exported = [
        c for c in cells if "".join(c["source"]).startswith(("#| export\n", "#| exporti\n"))
    ]
    for cell in exported:
        source = "".join(cell["source"])
        length = sum(bool(line.strip()) for line in source.splitlines()) - 1
        named = re.search(
            r"^class (Trainer|RunFacts|Loop|CheckpointCallback)\b", source, re.MULTILINE
        )
        assert length <= (150 if named else 60), source[:60]
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


@pytest.mark.slow
def test_the_wheel_installs_and_imports_in_a_bare_environment(tmp_path):
    """Built from the sdist, so that what it lacks is missed; torch and numpy are borrowed."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "_demo", "__pycache__", "*.egg-info", "build", "dist"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", wheel)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    import numpy
    import torch

    wanted = run(python, "-c", "import importlib.metadata as m; print(*m.requires('ununennium'))")
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
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    print(run(python, "-c", append + code, cwd=tmp_path, env=environment))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_stay_small(path):
    """The saved state of a chart would bring all of plotly's JavaScript with it."""
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert path.stat().st_size < 1_000_000
