"""Notebooks as a user runs them in JupyterLab, and reports as a reader sees them, in headless Chromium.

Run with `pytest tests/test_browser.py`; without a browser every test is skipped. Screenshots stay in pytest's temporary
folder.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PUBLISHED = sorted((Path(__file__).resolve().parent.parent / "reports").glob("*.html"))
LOAD, RUN = 60, 240  # seconds that JupyterLab may take to show a notebook, and a notebook to run


def api(server: dict, path: str):
    "An answer of the server's REST interface."
    request = urllib.request.Request(server["url"] + path, headers={"Authorization": f"token {server['token']}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def until(seconds: float, what: str, ready):
    "The first true value of `ready()`, asked four times a second."
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.25)
    return value


@pytest.fixture(scope="module")
def lab(copy, tmp_path_factory, browser):
    "JupyterLab on loopback over a copy of the repository: a random port, a token, nothing of the user's settings."
    home, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    settings = home / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    env = os.environ | {
        "PYTHONPATH": str(copy),
        "JUPYTER_TOKEN": token,
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--ServerApp.root_dir={copy}"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=copy)
    try:

        def started():
            assert process.poll() is None, f"JupyterLab ended: {(home / 'log').read_text()[-2000:]}"
            written = [f.read_text() for f in (home / "runtime").glob("jpserver-*.json")]
            return json.loads(written[0]) if written and written[0].endswith("}") else None

        server = until(LOAD, "JupyterLab starts", started)
        yield {"url": f"http://127.0.0.1:{server['port']}/", "token": token, "root": copy}
    finally:
        process.terminate()
        process.wait(timeout=20)


def restart_and_run_all(page, server: dict, path: str) -> list:
    "The cells of a notebook after Kernel > Restart Kernel and Run All Cells, read from the saved file."
    page.goto(f"{server['url']}lab/workspaces/{Path(path).stem}/tree/{path}?token={server['token']}")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=LOAD * 1000)
    kernels = until(LOAD, f"a kernel for {path}", lambda: [s for s in api(server, "api/sessions") if s["path"] == path])
    kernel = "api/kernels/" + kernels[0]["kernel"]["id"]
    until(LOAD, "the kernel is idle", lambda: api(server, kernel)["execution_state"] == "idle")
    page.locator(".lm-MenuBar-item", has_text="Kernel").click()
    page.locator(".lm-Menu-item", has_text="Restart Kernel and Run All Cells").click()
    page.locator(".jp-Dialog-button", has_text="Restart").click()
    file = Path(server["root"]) / path

    def finished():
        if api(server, kernel)["execution_state"] != "idle":
            return None
        page.locator(".jp-NotebookPanel:visible .jp-Notebook").first.press("Control+s")
        try:
            nb = nbformat.read(file, 4)
        except nbformat.reader.NotJSONError:
            return None  # the server is writing it
        cells = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
        failed = any(o.output_type == "error" for c in cells for o in c.outputs)
        return cells if failed or all(c.execution_count for c in cells) else None

    return until(RUN, f"every cell of {path} runs", finished)


def check_cells(cells: list):
    "Every code cell was executed, in order, and none ended in an error."
    errors = [f"{o.ename}: {o.evalue}" for c in cells for o in c.outputs if o.output_type == "error"]
    assert not errors
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))


@pytest.fixture
def page(browser, tmp_path):
    "A page of 1280 x 900, whose last state is kept as a picture."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.screenshot(path=tmp_path / "last.png")
    page.close()


def test_model_notebook_in_jupyterlab(page, lab):
    check_cells(restart_and_run_all(page, lab, "nbs/model/01_orthogonal.ipynb"))


def test_train_notebook_in_jupyterlab(page, lab, copy):
    path = copy / "pipelines" / "train.ipynb"
    nb = nbformat.read(path, 4)
    parameters = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in (("steps", 6), ("batch_size", 4), ("overrides", '"eval_batches=1 grammar_stories=2000"')):
        parameters.source, found = re.subn(rf"(?m)^({name}: \w+ = )\S+", rf"\g<1>{value}", parameters.source)
        assert found == 1, name
    nbformat.write(nb, path)
    cells = restart_and_run_all(page, lab, "pipelines/train.ipynb")
    check_cells(cells)
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs), "no curve is shown"


def test_failing_cell_is_noticed(page, lab, copy):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nb.cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "1 / 0", "2 + 2")]
    nbformat.write(nb, copy / "failing.ipynb")
    cells = restart_and_run_all(page, lab, "failing.ipynb")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_cells(cells)


# Every visible element with text of its own: the contrast of its colour against the nearest painted background.
CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const painted = c => c.length === 3 || c[3] > 0.5;
  const background = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (painted(c)) return c;
    }
    return [255, 255, 255];
  };
  const result = [];
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(" ").trim();
    if (!own || e.closest("svg, script, style") || !e.checkVisibility() || !e.getClientRects().length) continue;
    const a = luminance(parse(getComputedStyle(e).color)), b = luminance(background(e));
    result.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), own.slice(0, 60), e.tagName]);
  }
  return result.sort((x, y) => x[0] - y[0]);
}"""
BODY = "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
IMAGES = "() => [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.outerHTML.slice(0, 80))"
WIDTH = "() => document.documentElement.scrollWidth"


def luminance(color: str) -> float:
    "Mean channel of a computed colour, from 0 (black) to 1; transparent counts as the white beneath."
    values = [float(v) for v in re.findall(r"[\d.]+", color)]
    return 1.0 if len(values) == 4 and values[3] == 0 else sum(values[:3]) / (3 * 255)


def look(browser, file: Path, scheme: str, width: int, picture: Path) -> list[str]:
    "What is wrong with a page, as a reader with this scheme and width sees it."
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong = []
    page.on("console", lambda m: m.type == "error" and wrong.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(f"request: {r.url}"))
    page.goto(file.as_uri(), wait_until="load")
    page.screenshot(path=picture, full_page=True)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    ground, ink = map(luminance, page.evaluate(BODY))
    if (ground < 0.5) != (scheme == "dark") or (ink > 0.5) != (scheme == "dark"):
        wrong.append(f"{scheme}: background {ground:.2f}, text {ink:.2f}")
    texts = page.evaluate(CONTRAST)
    wrong += [f"contrast {c:.1f}: <{tag}> {text}" for c, text, tag in texts if c < 4.5][:5]
    wrong += [f"image: {image}" for image in page.evaluate(IMAGES)]
    if not texts:
        wrong.append("no text")
    if (scroll := page.evaluate(WIDTH)) > width:
        wrong.append(f"{scroll} px wide in a window of {width}")
    page.close()
    return wrong


@pytest.fixture(scope="module")
def small_report(tmp_path_factory) -> Path:
    "The HTML of an executed notebook that holds each kind of output a report has."
    from hybrid_nb.report.page import export_html

    folder = tmp_path_factory.mktemp("report")
    nb = nbformat.v4.new_notebook()
    sources = [
        "import matplotlib.pyplot as plt\nimport pandas as pd",
        "plt.plot([1, 2, 4]); plt.xlabel('step'); plt.show()",
        "pd.DataFrame([range(1000, 1030)] * 3, columns=[f'column {i}' for i in range(30)])",
        "print('word ' * 100); print('unbroken' * 50)",
        "import sys\nfor i in range(2):  # why\n    print(f'warning {i + 1.5}', file=sys.stderr)",
    ]
    nb.cells = [
        nbformat.v4.new_markdown_cell("# A report\n\nProse with *stress*, `code` and [a link](other.html)."),
        *map(nbformat.v4.new_code_cell, sources),
    ]
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    nbformat.write(nb, folder / "report.ipynb")
    return export_html(folder / "report.ipynb")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_report_reads_well(browser, small_report, tmp_path, scheme, width):
    assert look(browser, small_report, scheme, width, tmp_path / "page.png") == []


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_published_report_reads_well(browser, tmp_path, file):
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            assert look(browser, file, scheme, width, tmp_path / f"{scheme}-{width}.png") == []


def test_bad_page_is_noticed(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<body style='background:#fff;color:#222'><p style='color:#bbb'>pale</p><p style='width:2000px'>wide</p>"
        "<img src='none.png'><script>undefined.x</script><script src='http://127.0.0.1:9/x.js'></script>"
    )
    wrong = " | ".join(look(browser, tmp_path / "bad.html", "dark", 1280, tmp_path / "page.png"))
    for what in ("dark: background 1.00", "<P> pale", "px wide", "image: <img", "script: ", "request: http://127.0.0.1:9"):
        assert what in wrong
