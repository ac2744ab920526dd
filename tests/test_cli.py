"""The `hnb` command as a user types it: real processes.

Run with `pytest tests/test_cli.py`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_papermill import LOOP, PAPERMILL, SHOW, TRAIN, end, good_report, start, tiny

from hybrid_nb.cli.command import OutputLock

HNB = [str(Path(sys.executable).parent / "hnb")]


def hnb(folder: Path, *words) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of a command."
    return end(start([*HNB, *words], folder))


def test_help_answers_at_once_without_torch(tmp_path):
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        run = subprocess.run([*HNB, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.5, f"hnb --help takes {min(times):.2f} s"
    for name in ("run", "presets", "plan", "sample", "doctor", "verify", "hnb run train -p model large"):
        assert name in run.stdout
    check = "import sys\nsys.argv = ['hnb', '--help']\nfrom hybrid_nb.pipeline import main\n"
    check += "try: main()\nexcept SystemExit: print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "papermill", "nbformat", "nbconvert", "pandas", "matplotlib"}
    assert not heavy & set(run.stdout.splitlines()[-1].split())


def test_each_command_has_help_with_examples(tmp_path):
    runs = {name: start([*HNB, name, "--help"], tmp_path) for name in ("run", "plan", "sample", "verify")}
    for name, process in runs.items():
        code, out, err = end(process)
        assert (code, err) == (0, "") and f"\n  hnb {name} " in out, (name, out)


def test_presets_without_torch(tmp_path):
    code, out, err = hnb(tmp_path, "presets")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names[:4] == ["smoke", "small", "base", "large"]
    assert {"gpt-base", "oelm-freeze", "foundation-32l"} <= set(names)
    assert re.search(r"^foundation .* 208,638,720 ", out, re.M)


def test_errors_are_one_line(tmp_path):
    wrong = {
        ("rum",): (64, "No such command 'rum'"),
        ("run", "train", "-p", "steps", "many"): (64, "steps='many' is not of type int"),
        ("sample", "nowhere"): (65, "no run in"),
        ("sample", "runs/nowhere"): (65, "no run in runs/nowhere"),
        ("verify", "none.ipynb"): (65, "no report none.ipynb"),
    }
    tiny(tmp_path / "pipelines" / "train.ipynb")
    runs = {words: start([*HNB, *words], tmp_path) for words in wrong}
    for words, process in runs.items():
        code, out, err = end(process)
        assert (code, out, err.count("\n")) == (wrong[words][0], "", 1), (words, code, out, err)
        assert err.startswith("hnb: ") and wrong[words][1] in err, err
    assert not (tmp_path / "reports").exists()


def test_run_replaces_its_own_report_by_a_good_one_only(tmp_path):
    kept = {name: good_report(tmp_path, name) for name in ("good", "bad")}
    before, runs = kept["bad"].read_bytes(), {}
    for name, cell in (("good", LOOP), ("bad", "1 / 0")):
        path = tiny(tmp_path / "pipelines" / f"{name}.ipynb", cell, SHOW)
        runs[name] = start([*HNB, "run", path, "-p", "model", "base", "--output", kept[name]], tmp_path)
    code, out, err = end(runs["good"])
    assert (code, out.splitlines()[-2:]) == (0, ["report  reports/good.ipynb", "page    reports/good.html"]), err
    assert "step 2" in kept["good"].read_text() and "step 2" in kept["good"].with_suffix(".html").read_text()
    told = "hnb: ZeroDivisionError: division by zero (code cell 4); see reports/bad.FAILED.ipynb\n"
    assert end(runs["bad"]) == (1, "", told)
    assert kept["bad"].read_bytes() == before


def test_run_is_stopped_by_a_signal(tmp_path):
    path = tiny(tmp_path / "pipelines" / "train.ipynb", TRAIN, SHOW)
    process = start([*HNB, "run", path], tmp_path)
    while "step 3" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert code == 75 and "SIGINT: stopped; the same command continues the run" in err, err
    assert (tmp_path / "checkpoint").exists()


def head(words: list, folder: Path, lines: int, **options) -> tuple[int, str]:
    "Exit code, and stderr where it is not the same pipe, of a command whose reader leaves after some lines."
    process = start(words, folder, **options)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read() if process.stderr else ""
    return process.wait(timeout=60), err


def test_the_reader_of_a_pipe_may_leave(tmp_path):
    path = tiny(tmp_path / "pipelines" / "train.ipynb")
    for name, options in (("out", {}), ("both", {"stderr": subprocess.STDOUT})):
        assert head([*HNB, "run", path, "--output", f"reports/{name}.ipynb"], tmp_path, 1, **options) == (0, "")
        assert {f"{name}.ipynb", f"{name}.html"} <= {p.name for p in (tmp_path / "reports").iterdir()}
    assert head([*PAPERMILL, path, "reports/mill.ipynb", "--log-level", "ERROR"], tmp_path, 1) == (0, "")
    assert (tmp_path / "reports" / "mill.html").exists()
    for words in (["presets"], ["--help"], ["run", "--help"]):
        assert head([*HNB, *words], tmp_path, 0) == (0, ""), words
    careless = [sys.executable, "-c", "for i in range(9): print(i, flush=True); __import__('time').sleep(0.1)"]
    assert head(careless, tmp_path, 1)[0] == 1, "a program that does not care ends in a traceback"


def test_a_kill_leaves_nothing_that_stays(tmp_path):
    (tmp_path / "tmp").mkdir()
    env, long = os.environ | {"TMPDIR": str(tmp_path / "tmp")}, tiny(tmp_path / "pipelines" / "long.ipynb", TRAIN, SHOW)
    process = start([*HNB, "run", long], tmp_path, env=env)
    while "step 3" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    process.kill()
    process.communicate()
    left = [p.name for folder in ("tmp", "reports") for p in (tmp_path / folder).iterdir()]
    assert sorted(name[:4] for name in left) == [".tmp", "hnb-"], left
    time.sleep(1.1)
    path = tiny(tmp_path / "pipelines" / "train.ipynb")
    code, out, err = end(start([*HNB, "run", path, "--output", "reports/mine.ipynb"], tmp_path, env=env))
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["index.html", "mine.html", "mine.ipynb", "mine.json"]
    assert list((tmp_path / "tmp").glob("hnb-*")) == []


HOLD = """import time
from pathlib import Path
from hybrid_nb.runs.files import locked
Path('run').mkdir(exist_ok=True)
with locked(Path('run')):
    while len(list(Path('reports').glob('*.FAILED.ipynb'))) < int(Path('waits').read_text()):
        time.sleep(0.05)"""


def test_two_equal_commands_at_once_leave_one_report(tmp_path):
    (tmp_path / "waits").write_text("1")  # the one that holds the run waits until the other has failed
    tiny(tmp_path / "pipelines" / "train.ipynb", HOLD, SHOW)
    ended = sorted(end(process) for process in [start([*PAPERMILL, "pipelines/train.ipynb"], tmp_path) for _ in range(2)])
    assert [code for code, *_ in ended] == [0, 64] and "is in use by process" in ended[1][2], ended
    kinds = sorted(p.suffix for p in (tmp_path / "reports").iterdir())
    assert kinds == [".html", ".html", ".ipynb", ".json"], list((tmp_path / "reports").iterdir())


def test_a_report_that_another_process_makes(tmp_path):
    path, output = tiny(tmp_path / "pipelines" / "train.ipynb"), tmp_path / "elsewhere" / "mine.ipynb"
    claim = OutputLock(output)
    code, out, err = hnb(tmp_path, "run", path, "--output", output)
    assert (code, out, err) == (64, "", "hnb: another process is making mine.ipynb\n")
    claim.release()
    assert list(output.parent.iterdir()) == []


def test_plan_and_doctor_measure(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    plan = start([*HNB, "plan", "large"], tmp_path, env=env)
    doctor = start([*HNB, "doctor"], tmp_path, env=env)
    code, out, err = end(plan)
    assert code == 0, err
    assert "334,858,240" in out or "259,360,768" in out, "parameters of large"
    assert "papermill pipelines/train.ipynb -p model large" in out and "H200" in out
    code, out, err = end(doctor)
    assert code == 0, err
    for what in ("python", "torch", "papermill", "processor", "compiler", "browser", "free disk"):
        assert re.search(rf"^{what} +\S", out, re.M), what
    rates = re.findall(r"^(?:float32.*?|bfloat16) +([\d.,]+) [TGM]FLOP/s", out, re.M)
    assert len(rates) == 3 and all(float(rate.replace(",", "")) > 0 for rate in rates)


def test_processes_take_assumed_rates(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HYBRID_NB_RATES": "fp32=8e10 bf16=1e9 fp16=2e9"}
    plan = start([*HNB, "plan", "large"], tmp_path, env=env)
    whole = start([*HNB, "plan", "large", "-p", "full", "true"], tmp_path, env=env)
    doctor = start([*HNB, "doctor"], tmp_path, env=env)
    wrong = start([*HNB, "plan", "large"], tmp_path, env=env | {"HYBRID_NB_RATES": "bf61=1e9"})
    code, out, err = end(plan)
    assert code == 0, err
    assert "at 80 GFLOP/s in fp32 (bf16 is emulated on this device: 1.0 GFLOP/s, beside 80 GFLOP/s in fp32)" in out
    this_run = next(line for line in out.splitlines() if line.startswith("this run"))
    assert re.search(r"\b(\d|[1-9]\d|[12]\d\d) (seconds|minutes)$", this_run.strip()), this_run
    code, out, err = end(whole)
    assert code == 0 and "1.0 GFLOP/s in matrix products" in out and "bf16 is emulated" in out and "made for GPUs" in out
    code, out, err = end(doctor)
    assert code == 0 and re.search(r"^bfloat16 +1.0 GFLOP/s, emulated", out, re.M) and "not measured" in out
    code, out, err = end(wrong)
    assert (code, out) == (64, "") and err.startswith("hnb: HYBRID_NB_RATES='bf61=1e9': 'bf61' is none of fp32, bf16, fp16")
