"""The check of annotations finds what is planted, its exceptions do not grow, and what it has found stays mended.

Run with `pytest tests/test_types.py`.
"""

import re
import shutil
import subprocess
import sys
import tomllib

from test_repo import ROOT

from hybrid_nb.report.run import LiveReport
from hybrid_nb.study.run import LiveStudy

PLANTED = """from hybrid_nb.config.config import Config, asdict
from hybrid_nb.config.presets import get_config

def bare():
    return get_config("smoke").modle  # attr-defined

def shown(config: Config) -> str:
    return asdict(config)  # return-value

def learned(config: Config) -> float:
    return config.train.late_dropout + 1.0  # operator

def called() -> Config:
    get_config("smoke", overides={})  # call-arg
    return get_config(7)  # arg-type
"""
EXCEPTIONS = 32  # of modules from None checks or from a code: may only become smaller


def test_planted_mistakes_are_found(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "hybrid_nb", tmp_path / "hybrid_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hybrid_nb" / "planted.py").write_text(PLANTED)
    done = subprocess.run([sys.executable, "-m", "mypy", "hybrid_nb/planted.py"], cwd=tmp_path, capture_output=True, text=True)
    found = {int(line): code for line, code in re.findall(r"^hybrid_nb/planted\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)}
    wanted = {n: line.partition("  # ")[2] for n, line in enumerate(PLANTED.splitlines(), 1) if "  # " in line}
    assert (done.returncode, found) == (1, wanted), done.stdout + done.stderr


def test_exceptions_do_not_grow():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    own = [o for o in mypy["overrides"] if any(m.startswith("hybrid_nb") for m in o["module"])]
    assert not any("ignore_errors" in part for part in (mypy, *own))
    counted = sum(len(o["module"]) * (len(set(o["disable_error_code"]) - {"var-annotated"}) + ("strict_optional" in o)) for o in own)
    assert counted <= EXCEPTIONS, f"{counted} exceptions from the check of annotations: annotate instead"


def test_live_curves_need_no_notebook():
    assert LiveReport().draw(None) is None
    assert LiveStudy().draw(None) is None
