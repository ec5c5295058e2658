"""Run the quick start without a browser; leave the executed notebook and an HTML page."""

import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "nbs" / "tutorials" / "10_quick_start.ipynb"
FOLDER = ROOT / "_demo"


def main() -> None:
    """Run a copy in `_demo`; the source stays as it is."""
    FOLDER.mkdir(exist_ok=True)
    notebook = nbformat.read(SOURCE, as_version=4)
    print(f"Running {SOURCE.relative_to(ROOT)} ...", flush=True)
    start = time.monotonic()
    options = {"timeout": 1800, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    executed, page = FOLDER / "quick_start.ipynb", FOLDER / "quick_start.html"
    nbformat.write(notebook, executed)
    hidden = {"RegexRemovePreprocessor": {"patterns": [r"^#\s*\|\s*hide\b"], "enabled": True}}
    html, _ = HTMLExporter(config=Config(hidden)).from_notebook_node(notebook)
    page.write_text(html, encoding="utf-8")
    for cell in notebook.cells:
        if "scores" in cell.metadata.get("tags", []):
            print("".join(output.get("text", "") for output in cell.outputs).strip())
    print(f"Done in {time.monotonic() - start:.0f} s.")
    print(f"  the executed notebook  {executed}")
    print(f"  the page with curves   {page}")
    print(f"  the checkpoints        {FOLDER / 'checkpoints' / 'quick-start'}")


if __name__ == "__main__":
    main()
