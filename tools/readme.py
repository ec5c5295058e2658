"""Write README.md and its pictures from nbs/index.ipynb, outputs included."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]


def render(notebook_path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the README's text and its pictures by file name."""
    notebook = nbformat.read(notebook_path, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it
    hidden = {"RegexRemovePreprocessor": {"patterns": [r"^#\s*\|\s*hide\b"], "enabled": True}}
    resources = {"unique_key": "README", "output_files_dir": "README_files"}
    text, resources = MarkdownExporter(config=Config(hidden)).from_notebook_node(
        notebook, resources
    )
    text = re.sub(r"\n\n    <Figure size [^\n]*>\n", "\n", text)
    text = re.sub(r"\]\((?!https?:|README_files)([^)]+\.(?:ipynb|png))\)", r"](nbs/\1)", text)
    text = text.replace("](../", "](")
    text = re.sub(r"!\[png\]", "![figure]", re.sub(r"\n{3,}", "\n\n", text))
    note = "<!-- Written from nbs/index.ipynb by `make export`. Edit the notebook. -->\n\n"
    return note + text.strip() + "\n", resources["outputs"]


def main(folder: Path) -> None:
    """Replace README.md and README_files in a folder."""
    text, pictures = render(ROOT / "nbs" / "index.ipynb")
    shutil.rmtree(folder / "README_files", ignore_errors=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
