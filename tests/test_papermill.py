"""papermill's own command line on small notebooks that opted in, as a user types it: real processes, real kernels.

Run with `pytest tests/test_papermill.py`. Each fault is also played to stock papermill, which must fail it.
"""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import nbformat
import pytest
from papermill.cli import papermill as command

from hybrid_nb.cli.parameters import read_command
from hybrid_nb.report.result import RESULT_MIME, report_problem

PAPERMILL = [str(Path(sys.executable).parent / "papermill")]
STOCK = ["--engine", "nbclient"]
PARAMETERS = """model: str = "smoke"  # preset
steps: int = 3  # steps
flag: bool = True  # a switch
fields: str = "lr=1e-3 steps=4"  # papermill itself cannot read this default"""
LOOP = """import time
for step in range(steps):
    print("step", step, flush=True)
    time.sleep(0.05)"""
SHOW = "Result('train', model, 'PASS', {'val_ppl': 3.2, 'steps': steps, 'flag': flag})"


def tiny(path: Path, *cells: str, opted: bool = True) -> Path:
    "A small notebook with the parameters cell and the given code cells."
    v4 = nbformat.v4
    nb = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    if opted:
        nb.metadata["hybrid_nb"] = {"pipeline": "train", "subject": "model"}
    tagged = v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    imports = v4.new_code_cell("from hybrid_nb.report.result import Result")
    nb.cells = [v4.new_markdown_cell("# Tiny"), imports, tagged, *map(v4.new_code_cell, cells or (LOOP, SHOW))]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    return path


def start(words: list, folder: Path, **options) -> subprocess.Popen:
    "A process in a folder, its streams piped."
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(list(map(str, words)), cwd=folder, text=True, **options)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    "Exit code, stdout and stderr."
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


class Terminal:
    "A process on a terminal of 100 columns."

    def __init__(self, words: list, folder: Path):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = start(words, folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.text = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 4096)
            except OSError:
                return
            if not data:
                return
            self.text += data.decode(errors="replace")

    def end(self) -> tuple[int, str, str]:
        code = self.process.wait(timeout=60)
        self.reader.join(timeout=10)
        os.close(self.master)
        return code, self.text, ""


def fifo(words: list, folder: Path) -> subprocess.Popen:
    "A process whose stdin is a FIFO that stays open and empty."
    read, write = os.pipe()
    process = start(words, folder, stdin=read)
    os.close(read)
    process.fifo = write
    return process


def four_ways(folder: Path, *words) -> dict[str, tuple[int, str, str]]:
    "The same command on a terminal, in a pipe, with a FIFO on stdin, and as a module, all at once."
    terminal = Terminal([*PAPERMILL, *words], folder)
    pipe = start([*PAPERMILL, *words], folder)
    queue = fifo([*PAPERMILL, *words], folder)
    module = start([sys.executable, "-m", "papermill", *words], folder)
    ended = {"pipe": end(pipe), "module": end(module), "terminal": terminal.end()}
    os.close(queue.fifo)
    return ended | {"fifo": end(queue)}


def test_users_words_in_four_ways_at_once(tmp_path):
    tiny(tmp_path / "pipelines" / "train.ipynb")
    told = re.compile(
        r"step 0\r?\n(.|\n)*step 2\r?\n(.|\n)*report  reports/train-large-\w{6}(-\d)?\.ipynb\r?\npage    "
    )
    ended = four_ways(tmp_path, "pipelines/train.ipynb", "-p", "model", "large", "-p", "flag", "false", "-p", "fields", "lr=2e-3")
    for way, (code, out, err) in ended.items():
        assert code == 0 and told.search(out), (way, out, err)
        assert not re.search("unknown|[Uu]nable", out + err), (way, out, err)
    reports = sorted((tmp_path / "reports").glob("*.ipynb"))
    stem = reports[0].stem[:18]
    assert sorted(p.stem for p in reports) == sorted([stem, f"{stem}-2", f"{stem}-3", f"{stem}-4"])
    for path in reports:
        nb = nbformat.read(path, 4)
        assert report_problem(nb) is None
        assert nb.cells[-1].outputs[0].data[RESULT_MIME]["headline"] == {"val_ppl": 3.2, "steps": 3, "flag": False}
        assert nb.metadata["papermill"]["parameters"] == {"model": "large", "flag": False, "fields": "lr=2e-3"}
        assert path.with_suffix(".html").read_text().count("step 2") == 1
        assert str(tmp_path) not in path.read_text()
    assert (tmp_path / "reports" / "index.html").read_text().count("<tr>") == 5
    assert [p.name for p in (tmp_path / "reports").iterdir() if p.name.startswith(".")] == []


def test_stock_papermill_fails_the_users_words(tmp_path):
    path = tiny(tmp_path / "pipelines" / "train.ipynb", LOOP, opted=False)
    before, seen = path.read_bytes(), four_ways(tmp_path, "pipelines/train.ipynb", "-p", "model", "large")
    assert seen["terminal"][0] == 2 and "Missing argument 'OUTPUT_PATH'" in seen["terminal"][1]
    assert json.loads(seen["pipe"][1])["nbformat"] == 4
    assert seen["fifo"][0] != 0
    assert not (tmp_path / "reports").exists() and path.read_bytes() == before


def test_a_script_of_ones_own_is_left_alone(tmp_path):
    tiny(tmp_path / "pipelines" / "train.ipynb")
    (tmp_path / "mill.py").write_text("import sys, papermill\nprint(sys.argv[1:])")
    run = start([sys.executable, "mill.py", "pipelines/train.ipynb", "-p", "model", "x"], tmp_path)
    assert end(run)[:2] == (0, "['pipelines/train.ipynb', '-p', 'model', 'x']\n")


BAD = {
    "-p stesp 5": "unknown parameter 'stesp' (did you mean 'steps'?)",
    "-p steps many": "steps='many' is not of type int",
    "-p model ../../x": "name '../../x' is not",
}


def test_bad_parameters_end_in_one_line_before_anything(tmp_path):
    tiny(tmp_path / "pipelines" / "train.ipynb")
    runs = {words: start([*PAPERMILL, "pipelines/train.ipynb", *words.split()], tmp_path) for words in BAD}
    wrong = ["-p", "stesp", "5", "-p", "flag", "false"]
    stock = start([*PAPERMILL, "pipelines/train.ipynb", "out.ipynb", *wrong, *STOCK], tmp_path)
    for words, process in runs.items():
        code, out, err = end(process)
        assert (code, out, err.count("\n")) == (64, "", 1), (words, err)
        assert err.startswith("papermill: ") and BAD[words] in err
    assert not (tmp_path / "reports").exists()
    assert end(stock)[0] == 0, "papermill's own engine runs the defaults instead"
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[3].source == '# Parameters\nstesp = 5\nflag = "false"\n'


PLACES = ["out.ipynb", "-", "new/folder/out.ipynb", "pipelines"]
TRANSPORT = "from ipykernel import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"


def test_an_output_path_changes_nothing_but_the_place(tmp_path):
    leak = "import os, sys\nopen('ran', 'a').write('x')\nprint(os.environ['HF_TOKEN'])"
    tiny(tmp_path / "pipelines" / "train.ipynb", leak, TRANSPORT, SHOW)
    env, words = os.environ | {"HF_TOKEN": "tk/secret+1"}, [*PAPERMILL, "pipelines/train.ipynb"]
    wrong = {place: start([*words, place, "-p", "nosuch", "3"], tmp_path, env=env) for place in PLACES}
    for place, process in wrong.items():
        code, out, err = end(process)
        assert (code, out, err.count("\n")) == (64, "", 1) and "unknown parameter 'nosuch'" in err, (place, err)
    assert [p.name for p in tmp_path.iterdir()] == ["pipelines"], "nothing ran, and nothing was made"
    right = {place: start([*words, place, "-p", "flag", "false"], tmp_path, env=env) for place in PLACES}
    ended = {place: end(process) for place, process in right.items()}
    code, out, err = ended.pop("pipelines")
    assert (code, out, err.count("\n")) == (64, "", 1) and "output path pipelines is not that of a notebook" in err, err
    made = {"-": ended["-"][1]} | {place: (tmp_path / place).read_text() for place in ended if place != "-"}
    for place, text in made.items():
        nb = nbformat.reads(text, 4)
        assert ended[place][0] == 0 and report_problem(nb) is None, ended[place]
        assert "tk/secret" not in text + ended[place][2] and nb.cells[5].outputs[0].text == "ipc\n"
        assert nb.cells[-1].outputs[0].data[RESULT_MIME]["headline"]["flag"] is False
        assert place == "-" or {"out.html", "index.html"} <= {p.name for p in (tmp_path / place).parent.iterdir()}
    assert (tmp_path / "ran").read_text() == "xxx"


def test_what_is_no_report_is_not_written_to_stdout(tmp_path):
    runs = {}
    for name, (cell, _, _) in ENDS.items():
        source = tiny(tmp_path / "pipelines" / f"{name}.ipynb", cell, SHOW)
        runs[name] = start([*PAPERMILL, source, "-"], tmp_path)
    for name, process in runs.items():
        code, out, err = end(process)
        assert (code, out) == (ENDS[name][1], "") and err.splitlines()[-1].startswith(f"papermill: {ENDS[name][2]}"), (name, err)


def test_papermills_other_options_go_on_working(tmp_path):
    tiny(tmp_path / "pipelines" / "train.ipynb", "import os\nopen('here', 'w')\nprint('https://me:pw@example.org/x')", SHOW)
    (tmp_path / "sub").mkdir()
    options = "-k python3 -l python --cwd sub --report-mode --log-output --no-progress-bar --autosave-cell-every 1 --start-timeout 60 "
    options += "--request-save-on-cell-execute --execution-timeout 60 --stdout-file so --stderr-file se --inject-paths --log-level ERROR"
    one = start([*PAPERMILL, "pipelines/train.ipynb", "out.ipynb", *options.split(), "-p", "steps", "7"], tmp_path)
    values = {"-r": ["steps", "9"], "-y": ["{flag: false}"], "-b": ["bW9kZWw6IGJhc2U="]}  # model: base
    words = [word for name, given in values.items() for word in (name, *given)]
    two = start([*PAPERMILL, "pipelines/train.ipynb", "prepared.ipynb", "--prepare-only", *words], tmp_path)
    code, out, err = end(one)
    assert code == 0, err
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    assert report_problem(nb) is None and (tmp_path / "sub" / "here").exists()
    assert nb.cells[1].metadata["jupyter"] == {"source_hidden": True}
    assert (tmp_path / "sub" / "so").read_text() == "https://example.org/x\n"
    assert end(two)[0] == 0 and not (tmp_path / "here").exists()
    prepared = nbformat.read(tmp_path / "prepared.ipynb", 4)
    assert set(prepared.cells[3].source.splitlines()) == {"# Parameters", "steps = 9", "flag = False", 'model = "base"'}
    assert {cell.get("execution_count") for cell in prepared.cells} == {None}


def test_a_notebook_without_its_metadata_is_still_known(tmp_path):
    tiny(tmp_path / "train.ipynb", opted=False)
    code, out, err = end(start([*PAPERMILL, "train.ipynb", "-p", "nosuch", "3"], tmp_path))
    assert (code, out, err.count("\n")) == (64, "", 1) and "unknown parameter 'nosuch'" in err, err
    code, out, err = end(start([*PAPERMILL, "train.ipynb", "out.ipynb"], tmp_path))
    assert code == 0 and nbformat.read(tmp_path / "out.ipynb", 4).metadata["hybrid_nb"]["pipeline"] == "train", err


def test_report_folder_that_cannot_be_written(tmp_path):
    tiny(tmp_path / "pipelines" / "train.ipynb", "open('ran', 'w')", SHOW)
    (tmp_path / "reports").write_text("not a folder")
    code, out, err = end(start([*PAPERMILL, "pipelines/train.ipynb"], tmp_path))
    assert (code, out, err.count("\n")) == (74, "", 1) and "cannot write to" in err
    assert not (tmp_path / "ran").exists(), "no kernel was started"


TRAIN = """import time
try:
    for step in range(20_000):
        print("step", step, flush=True)
        time.sleep(0.01)
except KeyboardInterrupt:
    open("checkpoint", "w").write(str(step))
    print("saved", flush=True)"""


def test_sigterm_saves_the_checkpoint_and_finishes_the_report(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        tiny(folder / "pipelines" / "train.ipynb", TRAIN, "print('drawn')", SHOW)
    stock = start([*PAPERMILL, "pipelines/train.ipynb", "out.ipynb", "--stdout-file", "lines", *STOCK], theirs)
    process = start([*PAPERMILL, "pipelines/train.ipynb"], ours)
    while "step 3" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert code == 75 and out.endswith("saved\ndrawn\n"), (code, out, err)
    last = "papermill: SIGTERM: stopped; the same command continues the run; see reports/"
    assert err.splitlines()[-1].startswith(last)
    assert int((ours / "checkpoint").read_text()) >= 3
    (left,) = (ours / "reports").glob("*.ipynb")
    assert left.name.endswith(".FAILED.ipynb") and "drawn" in left.read_text()
    assert "FAILED" in (ours / "reports" / "index.html").read_text()
    while not (theirs / "lines").exists() or "step 3" not in (theirs / "lines").read_text():
        assert stock.poll() is None
        time.sleep(0.05)
    stock.send_signal(signal.SIGTERM)
    assert end(stock)[0] == -signal.SIGTERM
    time.sleep(0.5)
    assert not (theirs / "checkpoint").exists(), "stock papermill ends without a word to the kernel"


ENDS = {
    "killed": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        75,
        "the kernel died in code cell 3, killed or",
    ),
    "left": ("import sys\nsys.exit(0)", 65, "the notebook left by SystemExit(0) in code cell 3"),
    "numbers": (
        "from hybrid_nb.config.errors import RunError\nraise RunError('loss is NaN', 70)",
        70,
        "loss is NaN (code cell 3)",
    ),
    "ours": ("{}['x']", 1, "KeyError: 'x' (code cell 3)"),
}


def good_report(folder: Path, name: str) -> Path:
    "A published report, as an earlier run left it."
    result = {"pipeline": "train", "subject": "smoke", "verdict": "PASS", "headline": {"val_ppl": 3.2}}
    output = nbformat.v4.new_output("display_data", data={RESULT_MIME: result})
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[output])
    path = folder / "reports" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    path.with_suffix(".json").write_text(json.dumps({"title": name, "parameters": {}} | result))
    return path


def test_a_good_report_survives_a_bad_end(tmp_path):
    runs = {}
    for name, (cell, _, _) in ENDS.items():
        source, kept = tiny(tmp_path / "pipelines" / f"{name}.ipynb", cell, SHOW), good_report(tmp_path, name)
        runs[name] = kept, kept.read_bytes(), start([*PAPERMILL, source, kept, "--engine", "hybrid_nb"], tmp_path)
    for name, (kept, before, process) in runs.items():
        code, out, err = end(process)
        last = err.splitlines()[-1]
        assert code == ENDS[name][1] and last.startswith(f"papermill: {ENDS[name][2]}"), (name, code, err)
        assert last.endswith(f"; see reports/{name}.FAILED.ipynb") and "Traceback" not in err
        assert kept.read_bytes() == before
        assert report_problem(nbformat.read(kept.with_name(f"{name}.FAILED.ipynb"), 4))


def test_stock_papermill_takes_bad_ends_for_good(tmp_path):
    runs = {}
    for name in ("killed", "left"):
        source, kept = tiny(tmp_path / "pipelines" / f"{name}.ipynb", ENDS[name][0], SHOW), good_report(tmp_path, name)
        runs[name] = kept, start([*PAPERMILL, source, kept, *STOCK], tmp_path)
    assert {name: end(process)[0] for name, (_, process) in runs.items()} == {"killed": 138, "left": 0}
    killed = nbformat.read(runs["killed"][0], 4).cells
    assert {cell.metadata.papermill.status for cell in killed} == {"completed"}, "so says papermill of each cell"
    assert nbformat.read(runs["left"][0], 4).cells[-1].execution_count is None


def limit_files():
    "Stands for a full disk: no file may grow beyond 60 kB."
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_good_report_survives_a_full_disk(tmp_path):
    source = tiny(tmp_path / "pipelines" / "train.ipynb", "print('x' * 300_000)", SHOW)
    ours, theirs = good_report(tmp_path, "ours"), good_report(tmp_path, "theirs")
    before = ours.read_bytes()
    first = start([*PAPERMILL, source, ours, "--engine", "hybrid_nb"], tmp_path, preexec_fn=limit_files)
    second = start([*PAPERMILL, source, theirs, *STOCK], tmp_path, preexec_fn=limit_files)
    code, out, err = end(first)
    assert code == 74 and "\npapermill: cannot publish reports/ours.ipynb: File too large" in err, err
    assert ours.read_bytes() == before and "Traceback" not in err
    assert sorted(p.name for p in ours.parent.iterdir()) == ["ours.ipynb", "ours.json", "theirs.ipynb", "theirs.json"]
    assert end(second)[0] != 0
    with pytest.raises(ValueError):
        nbformat.read(theirs, 4)


def test_secrets_and_paths_stay_out(tmp_path):
    leaks = "print(os.environ['HF_TOKEN'], file=sys.stderr)\nprint('https://me:pw-7@example.org/x', os.getcwd())"
    page = "from IPython.display import HTML\nHTML('<b>' + os.environ['HF_TOKEN'] + '</b>')"
    transport = "from ipykernel import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"
    tiny(tmp_path / "pipelines" / "train.ipynb", f"import os, sys\n{leaks}", page, transport, SHOW)
    env = os.environ | {"HF_TOKEN": "tk/secret+1", "HOME": str(tmp_path)}
    code, out, err = end(start([*PAPERMILL, "pipelines/train.ipynb"], tmp_path, env=env))
    assert code == 0, err
    (report,) = (tmp_path / "reports").glob("*.ipynb")
    for text in (out, err, report.read_text(), report.with_suffix(".html").read_text()):
        assert "tk/secret" not in text and "pw-7" not in text and str(tmp_path) not in text
    assert "https://example.org/x ." in report.read_text()
    assert "<b>[redacted]</b>" in report.with_suffix(".html").read_text()
    assert nbformat.read(report, 4).cells[5].outputs[0].text == "ipc\n"


def test_forty_thousand_lines_are_kept(tmp_path):
    many = "for i in range(40_000): print('line', i, 'https://me:pw@example.org/x')"
    tiny(tmp_path / "pipelines" / "train.ipynb", many, SHOW)
    code, out, err = end(start([*PAPERMILL, "pipelines/train.ipynb"], tmp_path))
    assert code == 0, err
    lines = [f"line {i} https://example.org/x" for i in range(40_000)]
    assert out.splitlines()[:40_000] == lines
    (report,) = (tmp_path / "reports").glob("*.ipynb")
    assert nbformat.read(report, 4).cells[3].outputs[0].text.splitlines() == lines


def test_command_lines_are_read_as_click_reads_them():
    pool = "a.ipynb b.ipynb -p -pmodel x -1 --parameters=x --log-level INFO --engine=e -k -kpy --prepare-only -- "
    pool = (pool + "--no-progress-bar -y {} - --autosave-cell-every 5").split()
    seen = 0
    for i in range(4000):
        words = [pool[(i * 7919 + j * j * 104729 + (i >> j)) % len(pool)] for j in range(i % 6)]
        context = command.make_context("papermill", [], resilient_parsing=True)
        context.resilient_parsing = False
        try:
            values, rest, _ = command.make_parser(context).parse_args(args=list(words))
        except Exception:
            assert read_command(words) is None, words
            continue
        found = read_command(words)
        positionals = [v for k in ("notebook_path", "output_path") if isinstance(v := values.get(k), str)] + rest
        assert found is not None and [p for p in found[0]] == positionals, words
        pairs = [tuple(v) for name, v in found[1] if name in ("-p", "--parameters")]
        assert pairs == [tuple(v) for v in values.get("parameters", [])], words
        seen += bool(positionals and pairs)
    assert seen > 20
