"""Cleans notebooks: as `nbdev_clean` leaves them, and pipelines without outputs.

Git's filter is `clean.py NAME`, from stdin to stdout; `make hooks` installs it. `clean.py --write NAME...` changes the files.
"""

import json
import sys
import tempfile
from pathlib import Path

from nbdev.clean import nbdev_clean


def cleaned(text: bytes, name: str) -> bytes:
    "The text of a notebook as it is committed; what is no notebook stays as it is."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notebook.ipynb"
        try:
            notebook = json.loads(text)
            for cell in notebook["cells"] if name.startswith("pipelines/") else ():
                cell.update({"outputs": []} if cell["cell_type"] == "code" else {})
            path.write_text(json.dumps(notebook), encoding="utf-8")
            nbdev_clean(str(path))
            return path.read_bytes()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{name} is no notebook: {error}", file=sys.stderr)
            return text


if sys.argv[1] == "--write":
    for name in sys.argv[2:]:
        was = Path(name).read_bytes()
        if (now := cleaned(was, name)) != was:
            Path(name).write_bytes(now)
else:
    sys.stdout.buffer.write(cleaned(sys.stdin.buffer.read(), sys.argv[1]))
