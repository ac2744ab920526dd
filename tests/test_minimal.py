"""Every module imports with the requirements of a user: what only other extras and development bring is hidden."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_repo import PLACE, ROOT

OPTIONAL = ("datasets", "submitit", "peft", "nbdev", "fastcore", "execnb", "ghapi", "pytest", "playwright", "accelerate")

IMPORT_ALL = """
import importlib, json, sys, traceback
from importlib.machinery import PathFinder

hidden, modules = json.load(sys.stdin)

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
failed = {}
for name in modules:
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc(limit=-2)
print(json.dumps(failed))
"""


def closure(requirements: list[str]) -> set[str]:
    "The names of installed distributions that requirements need, those of requirements included."
    found, wanted = set(), [Requirement(r) for r in requirements]
    while wanted:
        requirement = wanted.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            needs = map(Requirement, distribution(requirement.name).requires or [])
        except PackageNotFoundError:  # needed on other machines
            continue
        extras = requirement.extras or {""}
        wanted += [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, _ in found}


def hidden() -> set[str]:
    "The top-level modules of installed distributions that a user without extras has not."
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    have = closure(needs) | {"hybrid-nb", "pip"}
    return {top for top, owners in packages_distributions().items() if not have & {canonicalize_name(o) for o in owners}}


def failures(modules: list[str], hide: set[str]) -> dict[str, str]:
    "The modules that cannot be imported, all in one process, each with the end of its traceback."
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    given = json.dumps([sorted(hide), modules])
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], input=given, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_module_imports_with_the_minimal_requirements():
    assert set(OPTIONAL) & set(packages_distributions()) <= hidden()
    assert not hidden() & {"torch", "transformers", "numpy", "papermill", "typer", "matplotlib"}
    assert failures([f"hybrid_nb.{name}".removesuffix(".__init__") for name in PLACE], hidden()) == {}


def test_what_is_hidden_cannot_be_imported():
    assert failures(["json", "fastcore", "fastcore.test", "yaml"], {"fastcore", "yaml"}).keys() == {"fastcore", "fastcore.test", "yaml"}
