"""Git's filter for a notebook: stdin as `nbdev_clean` leaves it, of a pipeline without outputs. `make hooks` installs it."""

import json
import sys
import tempfile
from pathlib import Path

from nbdev.clean import nbdev_clean

text, name = sys.stdin.buffer.read(), sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "notebook.ipynb"
    try:
        notebook = json.loads(text)
        for cell in notebook["cells"] if name.startswith("pipelines/") else ():
            cell.update({"outputs": []} if cell["cell_type"] == "code" else {})
        path.write_text(json.dumps(notebook), encoding="utf-8")
        nbdev_clean(str(path))
        text = path.read_bytes()
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # it is committed as it stands
        print(f"{name} is no notebook: {error}", file=sys.stderr)
sys.stdout.buffer.write(text)
