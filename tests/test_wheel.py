"""The package as others install it: a wheel, built without a network, used in a folder that holds nothing.

Run with `pytest tests/test_wheel.py`. The wheel is installed into a folder of its own, which stands before everything else on the
path, inside a repository of somebody else's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_papermill import end, start

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
WHEEL = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
METADATA = ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
TINY = "n_layer=1 d_model=32 n_head=2 d_ff=64 vocab_size=400 bpe_vocab=400 grammar_stories=300 seq_len=32 batch_size=4 eval_interval=2 "
TINY += "save_interval=2 log_interval=1 eval_batches=2"
SMALL = ["-p", "steps", "2", "-p", "precision", "fp32", "-p", "compile", "no", "-p", "overrides", TINY]


def run(words: list, folder: Path, env: dict | None = None) -> str:
    "What a command prints that must succeed."
    code, out, err = end(start(words, folder, env=env))
    assert code == 0, (words, out, err)
    return out


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    "A wheel of the checkout, built in a copy of it."
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in METADATA:
        shutil.copy(root / name, copy)
    for name in ("pipelines", "hybrid_nb"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "pipelines" / ".ipynb_checkpoints").mkdir(exist_ok=True)
    (copy / "pipelines" / ".ipynb_checkpoints" / "train-checkpoint.ipynb").write_text("{}")
    run([*WHEEL, "-w", out, copy], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, dict]:
    "An empty folder inside a repository that also holds the installed wheel, and the environment that finds it."
    there = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", there / "env", wheel], there)
    for words in ("init -q", "-c user.name=x -c user.email=x@x commit -q --allow-empty -m x"):
        subprocess.run(["git", *words.split()], cwd=there, check=True)
    (there / "empty").mkdir()
    return there / "empty", os.environ | {"PYTHONPATH": str(there / "env"), "OMP_NUM_THREADS": "1"}


def carried(root: Path) -> set[str]:
    "Pipelines and files of parameters, as paths in a checkout."
    return {p.relative_to(root).as_posix() for kind in ("*.ipynb", "params/*.yaml") for p in (root / "pipelines").glob(kind)}


def test_a_wheel_carries_modules_pipelines_and_parameters(root, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {p.relative_to(root).as_posix() for p in (root / "hybrid_nb").rglob("*.py")}
    assert names == modules | {f"hybrid_nb/{name}" for name in carried(root)}


def test_a_source_distribution_makes_the_same_wheel(root, wheel, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in METADATA:
        shutil.copy(root / name, copy)
    for name in ("pipelines", "hybrid_nb"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    run([*WHEEL, "-w", tmp_path, archive.with_suffix("").with_suffix("")], tmp_path)
    (again,) = tmp_path.glob("*.whl")
    contents = [{i.filename: i.CRC for i in zipfile.ZipFile(path).infolist() if "/RECORD" not in i.filename} for path in (wheel, again)]
    assert contents[0] == contents[1]


def test_entry_points_are_those_of_the_wheel(installed):
    folder, env = installed
    ask = "from importlib.metadata import distribution, entry_points as e\nimport hybrid_nb\n"
    ask += "print(hybrid_nb.__file__, distribution('hybrid-nb').locate_file(''), sep='\\n')\n"
    ask += "print([p.value for p in e(group='papermill.engine')], [p.value for p in e(group='console_scripts', name='hnb')])"
    module, place, points = run([sys.executable, "-c", ask], folder, env).splitlines()
    assert Path(module).parent.parent == Path(place) == folder.parent / "env"
    assert points == "['hybrid_nb.cli.engine:HybridEngine'] ['hybrid_nb.cli.main:main']"


def test_what_asks_only(installed):
    folder, env = installed
    hnb = folder.parent / "env" / "bin" / "hnb"
    assert "hnb run train" in run([hnb, "--help"], folder, env)
    assert "foundation-32l" in run([hnb, "presets"], folder, env)
    assert "papermill pipelines/train.ipynb -p model smoke" in run([hnb, "plan", "smoke"], folder, env)
    assert "4,096" in run([hnb, "plan", "pipelines/params/tinystories.yaml"], folder, env)
    code, out, err = end(start([hnb, "run", "trian"], folder, env=env))
    assert (code, out) == (64, "") and "(did you mean 'train'?); there are analyze, audit, " in err
    assert list(folder.iterdir()) == []


def test_a_run_in_an_empty_folder(installed):
    folder, env = installed
    hnb = folder.parent / "env" / "bin" / "hnb"
    out = run([hnb, "run", "train", *SMALL], folder, env)
    report = folder / re.search(r"^report +(reports/train-smoke-\w{6}\.ipynb)$", out, re.M)[1]
    assert sorted(p.name for p in folder.iterdir()) == ["reports", "runs"]
    made = [report.name, f"{report.stem}.html", f"{report.stem}.json", "index.html"]
    assert sorted(p.name for p in report.parent.iterdir()) == sorted(made)
    assert "made again" in run([hnb, "verify", report], folder, env)
    (info,) = (folder / "runs").glob("train-smoke-*/run.json")
    info = json.loads(info.read_text())
    assert info["git"] == {"commit": None, "dirty": None, "diff_sha256": None}, "the repository around it is not ours"
    assert run([hnb, "sample", info["name"], "--tokens", "5"], folder, env)
    run([*map(str, (sys.executable, "-m", "papermill")), "pipelines/train.ipynb", *SMALL, "-p", "seed", "3"], folder, env)
    assert len(list(report.parent.glob("train-smoke-*.ipynb"))) == 2
    assert str(folder.parent) not in report.read_text()
    package = folder.parent / "env" / "hybrid_nb"
    assert not [p for p in package.glob("runs/*") if p.suffix != ".py" and p.name != "__pycache__"] and not (package / "reports").exists()
