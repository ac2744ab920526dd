"""Reports, indexes and run folders that a stranger made, or that hold what must not get out: random ones, with a seed.

Run with `pytest tests/test_reports.py`.
"""

import copy
import html
import json
import os
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import mistune
import nbformat
import pytest
from test_cli import HNB
from test_papermill import end, good_report, start

from hybrid_nb.cli.verify import verify_quick
from hybrid_nb.config.errors import RunError
from hybrid_nb.config.presets import get_config
from hybrid_nb.report.index import results_table, write_index
from hybrid_nb.report.page import export_html
from hybrid_nb.report.result import RESULT_MIME
from hybrid_nb.runs.files import write_json
from hybrid_nb.runs.runs import claim_folder

REPORTS = Path(__file__).resolve().parent.parent / "reports"
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = [None, True, 0, -1, 1e308, 10**20, 10**400, 10**7, "", "x", "\ud83d", [], {}, [[]], {"": {}}, [1, "a"], DEEP, 3.5, "0" * 5000]


def places(value, path: tuple = ()) -> list[tuple]:
    "Where in a nested structure something stands."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for k, v in list(inner)[:40] for place in ((*path, k), *places(v, (*path, k)))]


def mutate(rng: random.Random, root):
    "The structure after a few values were deleted, doubled or replaced by values of any type."
    for _ in range(rng.choice((1, 1, 2, 5))):
        *at, last = rng.choice(places(root))
        node = root
        for step in at:
            node = node[step]
        how = rng.random()
        if how < 0.3 and len(root) > 1:
            del node[last]
        elif how < 0.4 and isinstance(node, list):
            node.insert(0, copy.deepcopy(rng.choice(VALUES)))
        else:
            node[last] = copy.deepcopy(rng.choice(VALUES))
    return root


@pytest.mark.parametrize("name", ["train-smoke-bc5d05", "context-foundation-5426c5", "qk_speed-gpt-base-1d3ee3"])
def test_verify_of_any_shape_is_one_line(tmp_path, name):
    rng, refused = random.Random(name), 0
    texts = [(REPORTS / f"{name}.{kind}").read_text() for kind in ("ipynb", "json")]
    for _ in range(15):
        (nb, data), part = map(json.loads, texts), rng.random()
        if part < 0.4:
            data = mutate(rng, data)
        elif part < 0.8:
            data["bundle"] = mutate(rng, data["bundle"])
        else:
            nb = mutate(rng, nb)
        path = tmp_path / f"{name}.ipynb"
        path.write_text(json.dumps(nb))
        path.with_suffix(".json").write_text(json.dumps(data))
        try:
            verify_quick(path)
        except RunError as error:
            refused += 1
            assert error.exit_code == 65 and "\n" not in str(error) and len(str(error)) < 1500
    assert refused > 8


def test_verify_in_a_process_is_one_line(tmp_path):
    nb, data = ((REPORTS / f"train-smoke-bc5d05.{kind}").read_text() for kind in ("ipynb", "json"))
    shapes = {"deep": "[" * 200_000, "bytes": "\udcff", "twice": '{"nbformat": 4, "nbformat": 4}', "number": "9" * 9000}
    pairs = {name: (text, data) for name, text in shapes.items()} | {f"data-{name}": (nb, text) for name, text in shapes.items()}
    for name, layers in (("huge", 10**9), ("text", "many")):
        changed = json.loads(data)
        changed["bundle"]["info"]["config"]["model"]["n_layer"] = layers
        pairs[name] = (nb, json.dumps(changed))
    for name, texts in pairs.items():
        for kind, text in zip(("ipynb", "json"), texts, strict=True):
            (tmp_path / f"{name}.{kind}").write_bytes(text.encode("utf-8", "surrogateescape"))
    runs = {name: start([*HNB, "verify", f"{name}.ipynb"], tmp_path) for name in pairs}
    for name, process in runs.items():
        code, out, err = end(process)
        assert (code, out, err.count("\n")) == (65, "", 1) and "Traceback" not in err, (name, code, err)


def test_a_forged_report_is_found_without_hashes(tmp_path):
    def forge(change):
        for suffix in (".ipynb", ".html", ".json"):
            shutil.copy(REPORTS / f"train-smoke-bc5d05{suffix}", tmp_path)
        path = tmp_path / "train-smoke-bc5d05.ipynb"
        nb = nbformat.read(path, 4)
        nb.metadata["hybrid_nb"].pop("sha256", None)
        change(nb, [c for c in nb.cells if c.cell_type == "code"])
        nbformat.write(nb, path)
        return path

    def table(nb, cells):
        data = next(o.data for c in cells if "alarm_table" in c.source for o in c.outputs)
        data["text/html"] = "<table><tr><td>all is well</td></tr></table>"

    changes = {
        "the table of code cell 11": table,
        "code cell 8 shows no picture": lambda nb, cells: [c.update(outputs=[]) for c in cells if "live.draw" in c.source],
        "what the last cell says": lambda nb, cells: cells[-1].outputs[0].data[RESULT_MIME].update(verdict="FAIL"),
        "the parameters": lambda nb, cells: nb.metadata["papermill"].update(parameters={"steps": 9}),
        "the page beside it": lambda nb, cells: nb.cells[0].update(source="# All is well"),
    }
    assert "without hashes" in verify_quick(forge(lambda nb, cells: None))
    for part, change in changes.items():
        with pytest.raises(RunError, match=part):
            verify_quick(forge(change))


class Elements(HTMLParser):
    "The elements of a page, and what of them could act."

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.acts, self.links = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.acts += [a for a in attributes if a[0].startswith("on") or a[0] in ("src", "srcdoc", "action", "style")]
        self.links += [value for name, value in attributes if name == "href"]


PIECES = ["<style>", "</td>", "</table>", "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'", '"', "&lt;", "<!--", "]]>",
          "javascript:alert(1)", "|", "\n| x |", "[a](javascript:x)", "![a](http://x)", "`", "*b*", "_c_", "\\", "\x00", "\ud83d",
          "<b>", "{{7}}", "7"]  # fmt: skip


def hostile(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))


def test_index_pages_and_readme_take_any_text_as_text(tmp_path):
    rng, folder = random.Random(0), tmp_path / "reports"
    for i in range(12):
        good_report(tmp_path, f"plain-{i}")
    plain, rows = Elements(write_index(folder).read_text()), mistune.html(results_table(folder))
    shutil.rmtree(folder)
    for i in range(12):
        stem = hostile(rng).replace("/", "").replace("\x00", "").encode("utf-8", "replace").decode()
        path = good_report(tmp_path, f"{stem}{i}")
        nb, data = (json.loads(path.with_suffix(kind).read_text()) for kind in (".ipynb", ".json"))
        told = {"pipeline": hostile(rng), "subject": hostile(rng), "commit": hostile(rng), "path": "x", "trial": hostile(rng)}
        data |= told | {"headline": {hostile(rng): hostile(rng)}, "title": hostile(rng)}
        nb["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": f"# {hostile(rng)}", "id": f"c{i}"})
        path.write_text(json.dumps(nb))
        path.with_suffix(".json").write_text(json.dumps(data))
    (folder / "broken.json").write_text("[" * 100_000)
    (folder / "shape.json").write_text('{"pipeline": 4, "title": 5, "headline": {"a": []}}')
    page = Elements(write_index(folder).read_text())
    assert (page.tags, page.acts) == (plain.tags, [])
    assert all("%3A" in link or ":" not in link for link in page.links)
    table = Elements(mistune.html(results_table(folder)))
    assert table.tags == Elements(rows).tags and not table.acts
    told = [json.loads(p.read_text()) for p in folder.glob("*[0-9].json")]
    assert set(Elements("".join(f"<td>{t['commit'][:7]}</td>" for t in told)).tags) > {"td"}, "the former way lets elements in"
    for path in sorted(folder.glob("*[0-9].ipynb")):
        shown = Elements(export_html(path).read_text())
        assert not {"script", "iframe", "object"} & set(shown.tags) and not shown.acts
        assert shown.tags.count("style") == 1 and all(":" not in link for link in shown.links)


def test_no_secret_reaches_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLACK_WEBHOOK", "wh<&'\"+/1")
    config = get_config("smoke", {"data.source": "hf:me:tk-12345678@owner/name"})
    folder = tmp_path / "run"
    claim_folder(folder, config)
    claim_folder(folder, config)  # the same configuration continues it
    errors = [html.escape(os.environ["SLACK_WEBHOOK"]), repr(os.environ["SLACK_WEBHOOK"])]
    write_json(folder / "run.json", {"data": {"source": "https://me:p@ss/w@host/x?sig=abc%2B1"}, "error": errors})
    text = "".join(p.read_text() for p in folder.iterdir())
    assert "tk-12345678" not in text and "p@ss" not in text and "abc%2B1" not in text and "+/1" not in text
    assert json.loads((folder / "config.json").read_text())["data"]["source"] == "hf:owner/name"
    assert json.loads((folder / "run.json").read_text())["error"] == ["[redacted]", "'[redacted]'"]
