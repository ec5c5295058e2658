"""Run notebooks in place and store their outputs: all notebooks, or those named."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"


def main(names: list[str]) -> None:
    """Run each notebook in its own folder."""
    every = (path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    for path in [Path(name).resolve() for name in names] or sorted(every):
        print(path.relative_to(ROOT), flush=True)
        notebook = nbformat.read(path, as_version=4)
        # A chart's state would include plotly's JavaScript, five megabytes.
        options = {"timeout": 1800, "coalesce_streams": True, "store_widget_state": False}
        NotebookClient(
            notebook, resources={"metadata": {"path": str(path.parent)}}, **options
        ).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
