"""Make nbval and nbdev agree on which notebook cells to run and compare."""

import configparser
import re
from pathlib import Path

_settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
_settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
# nbval has a kernel, and nbdev has none.
_flags = "|".join(set(_settings["DEFAULT"]["tst_flags"].split()) - {"kernel"})
_not_run = re.compile(rf"^\s*#\s*\|\s*(eval:\s*false|{_flags})\s*$", re.MULTILINE)


def pytest_collection_modifyitems(items):
    """Compare cells without an execution count too; skip cells that nbdev does not run."""
    for item in items:
        cell = getattr(item, "cell", None)  # only nbval's items have one
        if cell is None:
            continue
        if cell.execution_count is None:
            cell.execution_count = 1
        if _not_run.search(cell.source):
            item.options["skip"] = True
