"""Writes the README and the pages of docs/ that show computed values, each from its executed notebook: `make docs`.

python docs/build.py [FOLDER]    # FOLDER: where README.md and docs/ are written; the repository unless given
"""

import os
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("measured", "claims", "notebooks", "adding-an-experiment")
PAGES = {"nbs/index.ipynb": "README.md"} | {f"nbs/docs/{name}.ipynb": f"docs/{name}.md" for name in DOCS}


def relink(text: str, source: Path, target: Path) -> str:
    "Text whose relative links lead from the target to where they led from the notebook."

    def moved(link: re.Match) -> str:
        path, hash_, anchor = link[1].partition("#")
        if not path or "://" in path:
            return link[0]
        place = Path(os.path.normpath(source.parent / path))
        return f"]({Path(os.path.relpath(place, target.parent)).as_posix()}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


def shown(output) -> str:
    "An output as Markdown."
    if output.output_type == "stream":
        return f"```\n{output.text.strip()}\n```"
    return output.data.get("text/markdown") or f"```\n{output.data['text/plain']}\n```"


def convert(source: str, target: str) -> dict[str, str]:
    "The files that a notebook becomes, by path: the page, and a figure; the first line of its plain text stands for who cannot see it."
    parts, files = [], {}
    figure = f"docs/{Path(target).stem.lower()}.svg"  # one a page
    link = Path(os.path.relpath(figure, Path(target).parent)).as_posix()
    for cell in nbformat.read(ROOT / source, 4).cells:
        if cell.cell_type == "markdown":
            parts.append(relink(cell.source, Path(source), Path(target)))
        elif cell.cell_type == "code":
            if "remove-input" not in cell.metadata.get("tags", ()):
                parts.append(f"```python\n{cell.source}\n```")
            for output in cell.outputs:
                if svg := output.get("data", {}).get("image/svg+xml"):
                    parts.append(f"![{output.data['text/plain'].splitlines()[0]}]({link})")
                    files[figure] = svg
                else:
                    parts.append(relink(shown(output), Path(source), Path(target)))
    return {target: "\n\n".join(part.strip("\n") for part in parts) + "\n"} | files


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    for page in PAGES.items():
        for name, text in convert(*page).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
