"""What holds for the repository as a whole: notebooks and modules, imports, pipelines, pinned versions, the README."""

import ast
import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hybrid_nb
from hybrid_nb.account.plan import SHARED_PARAMETERS
from hybrid_nb.report.pipelines import declared

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("config", "runs", "data", "model", "account", "train", "report", "study", "experiments", "cli")
NOTEBOOKS = [path for p in (".", *PACKAGES) for path in sorted((ROOT / "nbs" / p).glob("[0-9][0-9]_*.ipynb"))]
SOURCES = [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs" / "docs").glob("*.ipynb"))]  # of the README and of docs/
PIPELINES = sorted((ROOT / "pipelines").glob("*.ipynb"))


def module_of(path: Path) -> str:
    "The module that a notebook exports, without the name of the package."
    return next(m[1] for c in code_cells(path) if (m := re.match(r"#\|\s*default_exp ([\w.]+)", c["source"])))



def code_cells(path: Path) -> list[dict]:
    "The code cells of a notebook, each with its source in one string."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


PLACE = {module_of(path): place for place, path in enumerate(NOTEBOOKS)}


def tree(source: str) -> ast.Module:
    "The syntax tree of a cell, less IPython's magics."
    return ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def mixes_imports(source: str) -> bool:
    "True where a cell imports at its top level and does something else as well."
    body = tree(source).body
    imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
    return any(imports) and not all(imports)


def git(*arguments: str) -> list[str]:
    "The lines that git prints, or none outside a checkout."
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.splitlines() if run.returncode == 0 else []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_its_module(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    lines = "".join(first["source"]).splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("> ") and lines[1].endswith(".")
    *package, module = module_of(path).split(".")
    assert package == list(path.relative_to(ROOT / "nbs").parts[:-1])
    assert module.strip("_") == path.stem[3:] or (module, path.stem) == ("__init__", "00_hybrid_nb")
    assert Path(ROOT, "hybrid_nb", *package, f"{module}.py").exists()


def test_every_module_has_a_notebook():
    files = [p.relative_to(ROOT / "hybrid_nb") for p in (ROOT / "hybrid_nb").rglob("*.py") if p.read_text().strip()]
    modules = {".".join(p.with_suffix("").parts) for p in files} - {"_modidx"}
    assert modules == set(PLACE)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOURCES], ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    assert [cell["source"] for cell in code_cells(path) if mixes_imports(cell["source"])] == []


def test_mixed_imports_are_found():
    assert mixes_imports("import math\nmath.pi")
    assert not mixes_imports("#| export\nimport math\nfrom json import loads")
    assert not mixes_imports("def f():\n    import torch\n    return torch")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_for_a_gpu_pass_without_one(path):
    for cell in code_cells(path):
        if re.match(r"#\|\s*gpu", cell["source"]):
            assert "cuda.is_available()" in cell["source"], f"JupyterLab runs this cell everywhere:\n{cell['source']}"


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_pipeline_is_prose_and_calls(path):
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    cells = code_cells(path)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert [n for cell in cells for n in ast.walk(tree(cell["source"])) if isinstance(n, defined)] == []
    prose = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
    assert not [text for text in prose if "$" in text], "a report has no MathJax: formulas of a pipeline are words"
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for node in tree(tagged[0]["source"]).body:
        assert isinstance(node, ast.AnnAssign), "a parameter is one `name: type = default  # help` a line"
    for line in tagged[0]["source"].splitlines():
        assert not line.strip() or line.startswith("#") or re.search(r"\S  # \S", line), line


def test_shared_parameters_are_described_once():
    "A comment repeats the table's text; where there is no preset to fall back on, it leaves out what an unset value means."
    cells = {path.stem: declared(nbformat.read(path, as_version=4)) for path in PIPELINES}
    uses = Counter(name for found in cells.values() for name in found)
    assert {name for name, count in uses.items() if count > 1} - set(SHARED_PARAMETERS) == {"arms", "reports", "settings"}
    for pipeline, found in cells.items():
        for name in found.keys() & SHARED_PARAMETERS.keys():
            shared, told = SHARED_PARAMETERS[name].help, found[name].help
            first = shared.partition("; ")[0]
            assert f"{told}; ".startswith(f"{shared}; ") or told == first, f"{pipeline}: {name}: {told!r} is not {shared!r}"
    for name, parameter in cells["train"].items():
        shared = SHARED_PARAMETERS[name]
        assert (parameter.hint, parameter.default) == (shared.hint, shared.default), name


def test_no_path_of_one_machine():
    places = re.compile(r"(?<![\w.~])/(work|root|home|tmp/[a-z]+nb)/")
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        path = ROOT / name
        if path.suffix in {".py", ".ipynb", ".md", ".ini", ".toml", ".txt", ".yaml", ".html", ""} and path.is_file():
            if path != Path(__file__).resolve():
                found = places.search(path.read_text(encoding="utf-8"))
                assert not found, f"{name} names {found[0]}"


def test_importing_is_quick_and_leaves_torch_alone():
    check = "import time; t = time.perf_counter(); import {}; import sys; assert 'torch' not in sys.modules; "
    check += "print(time.perf_counter() - t)"
    for module, seconds in (("hybrid_nb", 0.1), ("hybrid_nb.config.documents", 0.3), ("hybrid_nb.runs.files", 0.5)):
        times = []
        for _ in range(3):
            run = subprocess.run([sys.executable, "-c", check.format(module)], cwd=ROOT, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            times.append(float(run.stdout))
        assert min(times) < seconds, f"import {module} takes {min(times):.2f} s"


def project() -> dict:
    "The metadata of the package."
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def settings() -> configparser.SectionProxy:
    "The one section of settings.ini."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_every_requirement_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines == sorted(lines) and all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    needs = [*project()["dependencies"], *(r for extra in project()["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, needs):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} excludes the pinned {pinned}"


def test_known_holes_are_excluded():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for name, least in (("torch", "2.10"), ("transformers", "5.3"), ("nbconvert", "7.17.1")):
        assert Requirement(f"x>={least}").specifier.contains(pins[name])


def test_metadata_of_the_package():
    from importlib.metadata import entry_points, version

    assert version("hybrid-nb") == settings()["version"] == hybrid_nb.__version__
    assert (settings()["repo"], settings()["git_url"]) == (project()["name"], project()["urls"]["Repository"])
    assert not settings().keys() & {"requirements", "min_python", "description", "author", "console_scripts"}
    assert [e.value for e in entry_points(group="papermill.engine", name="hybrid_nb")] == [
        "hybrid_nb.cli.engine:HybridEngine"
    ]
    assert [e.value for e in entry_points(group="console_scripts", name="hnb")] == ["hybrid_nb.cli.main:main"]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_are_made_from_their_notebooks(tmp_path):
    subprocess.run(["make", "-s", "readme", f"OUT={tmp_path}", f"VENV={sys.prefix}"], cwd=ROOT, check=True, capture_output=True)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stem for path in made if path.suffix == ".md"} == {"README"} | {path.stem for path in SOURCES[1:]}
    for path in made:
        name = path.relative_to(tmp_path)
        assert path.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), f"{name} is stale: make docs"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_page_is_what_its_cells_show_today(path):
    nb = nbformat.read(path, 4)
    shown = [line for cell in nb.cells for line in shown_lines(cell)]
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    today = {line for cell in nb.cells for line in shown_lines(cell)}
    assert shown and [line for line in shown if line not in today] == [], "make docs"


def shown_lines(cell) -> list[str]:
    "What a page takes from a cell, a figure by its text; a report that was made since need not be in it."
    data = [o.get("data", {}) | {"stream": o.get("text", "")} for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    return "\n".join(d.get("text/markdown") or "image/svg+xml" in d and d["text/plain"] or d["stream"] for d in data).splitlines()


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", ">"))) <= 140


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda p: p.stem)
def test_links_of_a_page_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name} links to {link}, which is missing"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_tables_of_a_page_are_whole(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for row, after in zip(lines, lines[1:], strict=False):
        if row.startswith("|") and after.startswith("|"):
            columns = [len(re.findall(r"(?<!\\)\|", line)) for line in (row, after)]
            assert columns[0] == columns[1], after


def test_map_lists_every_notebook():
    text = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS + PIPELINES:
        assert f"](../{path.relative_to(ROOT).as_posix()})" in text, f"the map lacks {path.name}: make docs"


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    "A repository of the files that hooks touch, with a notebook and a pipeline, and a home that is empty."
    for name in ("HOME", "XDG_CONFIG_HOME", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "x")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "x@example.org")
    there = tmp_path / "a clone"
    files = "Makefile settings.ini constraints.txt .gitattributes hooks/clean.py nbs/train/04_evaluate.ipynb pipelines/train.ipynb"
    for name in files.split():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, there / name)
    (tmp_path / "home").mkdir()
    in_clone(there, "git init -q -b main", "git add -A", "git commit -qm start")
    return there


def in_clone(there: Path, *commands: str, code: int = 0) -> str:
    "What the last of some commands prints; all but it must succeed."
    for i, words in enumerate(commands, 1):
        run = subprocess.run(shlex.split(words), cwd=there, capture_output=True, text=True)
        assert run.returncode == (code if i == len(commands) else 0), (words, run.stdout, run.stderr)
    return run.stdout


HOOKS = f"make -s hooks VENV={sys.prefix}"


def executed(path: Path):
    "Leaves a notebook as JupyterLab leaves it: counts, times, the kernel's version, and an output."
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}
    for number, cell in enumerate(nb["cells"], 1):
        cell["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01"}
        if cell["cell_type"] == "code":
            cell["execution_count"] = number
    if path.parent.name == "pipelines":
        last = [cell for cell in nb["cells"] if cell["cell_type"] == "code"][-1]
        last["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["x"]}]
    path.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def test_hooks_clean_on_commit_and_touch_nothing_else(clone):
    before = {p.relative_to(clone): p.read_bytes() for p in clone.rglob("*") if p.is_file() and p.name != "config"}
    in_clone(clone, HOOKS)
    after = {p.relative_to(clone): p.read_bytes() for p in clone.rglob("*") if p.is_file() and p.name != "config"}
    assert after == before and list((clone.parent / "home").iterdir()) == []
    assert in_clone(clone, "git status --porcelain") == ""
    for name in ("nbs/train/04_evaluate.ipynb", "pipelines/train.ipynb"):
        executed(clone / name)
        assert in_clone(clone, f"git add {name}", f"git show :{name}").encode() == (ROOT / name).read_bytes()
    assert in_clone(clone, "git status --porcelain") == ""
    (clone / "nbs" / "broken.ipynb").write_text("{")
    assert in_clone(clone, "git add -A", "git show :nbs/broken.ipynb") == "{", "what is no notebook is kept as it is"


def test_without_hooks_counts_are_committed(clone):
    executed(clone / "nbs" / "train" / "04_evaluate.ipynb")
    assert "2026-01-01" in in_clone(clone, "git add -A", "git show :nbs/train/04_evaluate.ipynb")


@pytest.mark.parametrize("hooks", [True, False])
def test_hooks_merge_cell_by_cell(clone, hooks):
    if hooks:
        in_clone(clone, HOOKS)
    path = clone / "nbs" / "train" / "04_evaluate.ipynb"
    text = path.read_text(encoding="utf-8")
    for branch, heading in (("theirs", "Theirs"), ("main", "Ours")):
        in_clone(clone, f"git checkout -q {'-b ' * (branch == 'theirs')}{branch}")
        path.write_text(re.sub(r'"# .*\\n"', f'"# {heading}\\\\n"', text, count=1), encoding="utf-8")
        in_clone(clone, f"git commit -qam {branch}")
    in_clone(clone, "git merge -q theirs", code=1)
    if not hooks:
        with pytest.raises(ValueError):
            json.loads(path.read_text(encoding="utf-8"))
        return
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert any("# Ours" in source for source in sources) and any("# Theirs" in source for source in sources)
