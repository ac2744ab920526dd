"""What may depend on what, over the generated package and over what uses it: imports, strings that name modules, drawing, writing.

Each rule is a function of source text that returns what breaks it, is applied to all files, and is shown to fail on a small text.
The lists of exceptions only shrink: one that is no longer needed fails as well.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from test_repo import NOTEBOOKS, PACKAGES, PIPELINES, PLACE, ROOT, code_cells, module_of, tree

from hybrid_nb import FORMER, PUBLIC

REGISTRY = {"__init__", "experiments.registry"}  # tables of modules: former names, and experiments by kind
SPELLED = {  # who names another module in a string beside them, and which
    ("train.launch", "train"),  # the command line of its processes
    ("study.launch", "train"),
    ("cli.verify", "report.run"),  # imported once a report is to be verified
    ("experiments.benchmark", "config.presets"),  # statements that are timed in processes of their own
    ("experiments.benchmark", "account.params"),
    ("experiments.benchmark", "model.hybrid"),
}
UPWARD = {
    ("study.launch", "cli.main"),  # an arm that is a report of its own
    ("experiments.benchmark", "cli.main"),  # `hnb --help` is timed
    ("report.pipelines", "pipeline"),  # the import cell of a notebook that is checked, by the module's former name
}
CROSSING = {("experiments.audit", "experiments.srte")}  # totals that document 000 states
WRITERS = {"runs.files", "data.tokens", "train.checkpoint", "report.publish"}
WRITING = {  # beside them
    "runs.messages",  # the log of an unforeseen error
    "runs.runs",  # records
    "model.ssm",  # a compiled kernel and its source
    "model.decoder", "model.projector",  # save_pretrained and save of a model
    "train.loop", "train.lora",  # models of a run that is done
    "study.compare", "study.launch",  # examples of runs; what trials are given
    "experiments.srte_convert", "experiments.distill", "experiments.finetune", "experiments.parallel", "experiments.dense",
}


@cache
def docstrings(node: ast.AST) -> set[int]:
    "The identities of the constants that are docstrings."
    holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    first = [n.body[0] for n in ast.walk(node) if isinstance(n, holders) and n.body]
    return {id(s.value) for s in first if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}


def resolved(node: ast.ImportFrom, module: str) -> str | None:
    "The module that a `from` statement reads, without the package's name; None for another package's."
    if not node.level:
        package, _, name = (node.module or "").partition(".")
        return name if package == "hybrid_nb" else None
    parts = ["hybrid_nb", *module.split(".")][: -node.level]
    return ".".join([*parts, *filter(None, [node.module])]).partition(".")[2]


def imports(node: ast.AST, module: str = "x.y") -> Iterator[tuple[str, str | None]]:
    "Each module of the package that a statement at any depth imports, and the name it takes; None: the module itself."
    for n in ast.walk(node):
        if isinstance(n, ast.ImportFrom) and (home := resolved(n, module)) is not None:
            yield from ((home, a.name) for a in n.names)
        elif isinstance(n, ast.Import):
            yield from ((a.name.partition(".")[2], None) for a in n.names if a.name.split(".")[0] == "hybrid_nb")


@cache
def module_named(dotted: str) -> str | None:
    "The module or package that the front of a dotted name is, the longest."
    parts = dotted.split(".")
    fronts = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((front for front in fronts if front in PLACE or front in PACKAGES), None)


def target(home: str, name: str | None) -> str | None:
    "The module that an import reads: `from hybrid_nb.model import rope` reads model.rope."
    return module_named(f"{home}.{name}".strip(".") if name else home)


@cache
def spelled(node: ast.AST) -> set[str]:
    "The modules that strings name: alone, in `python -m`, in code, in f-strings. `hybrid_nb.{` counts as the module '*'."
    skip, found = docstrings(node), set()
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in skip:
            former = re.findall(r"(?:from|import|-m) hybrid_nb\.(\w+)", n.value)
            found |= {name for name in former if name in FORMER and name not in PACKAGES}
            found |= {module_named(name) for name in re.findall(r"(?<![\w./])hybrid_nb\.([\w.]*\w)", n.value)} - {None}
        elif isinstance(n, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{" for p in n.values]
            found |= {"*"} if re.search(r"(?<![\w./])hybrid_nb\.\{", "".join(parts)) else set()
    return found


def computed_imports(node: ast.AST) -> list[str]:
    "Calls that import a module whose name is not a constant."
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    named = [(getattr(c.func, "attr", getattr(c.func, "id", "")), c) for c in calls]
    dynamic = {"import_module", "__import__", "run_module", "run_path"}
    return [ast.unparse(c) for name, c in named if name in dynamic and not (c.args and isinstance(c.args[0], ast.Constant))]


@cache
def place(name: str) -> int:
    "The place of a module in the order of imports; a package has that of its first module, one of a former name the last."
    if name in PACKAGES:
        return min(p for m, p in PLACE.items() if m.startswith(name + "."))
    return PLACE.get(name, len(PLACE))


def upward(node: ast.AST, module: str) -> set[str]:
    "The modules further right, or of a higher number, that code imports or names in strings."
    read = {target(home, name) for home, name in imports(node, module)} - {None}
    return {name for name in read | spelled(node) - {"*"} if place(name) > PLACE[module]}


def crossing(node: ast.AST, module: str) -> set[str]:
    "The other experiments that an experiment imports or names."
    read = {target(home, name) for home, name in imports(node, module)} | spelled(node)
    experiments = {name for name in read if name and name.startswith("experiments.")}
    return experiments - {module} - REGISTRY if module.startswith("experiments.") and module not in REGISTRY else set()


def others_spelled(node: ast.AST, module: str) -> set[str]:
    "The modules beside itself that a module names in strings."
    return spelled(node) - {module} - ({module.removesuffix(".__main__")} if module.endswith(".__main__") else set())


def draws(node: ast.AST) -> bool:
    "True where code imports a library that draws."
    tops = {a.name.split(".")[0] for n in ast.walk(node) if isinstance(n, ast.Import) for a in n.names}
    tops |= {(n.module or "").split(".")[0] for n in ast.walk(node) if isinstance(n, ast.ImportFrom) and not n.level}
    return bool(tops & {"matplotlib", "seaborn"})


def writes(node: ast.AST) -> list[str]:
    "Calls that open a file for writing, or that write one whole."
    found = []
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        name, given = getattr(call.func, "attr", getattr(call.func, "id", "")), [*call.args, *(k.value for k in call.keywords)]
        modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        opened = name in ("open", "fdopen") and any(re.fullmatch(r"(?=.*[wax+])[rwaxbt+]{1,3}", m) for m in modes)
        flags = name == "open" and re.search(r"O_(WRONLY|RDWR|CREAT)", ast.unparse(call))
        whole = name in ("write_text", "write_bytes", "save_file", "save_pretrained", "copyfile", "copytree", "mkstemp", "tofile", "savez")
        found += [ast.unparse(call)] if (opened or flags or whole) and "devnull" not in ast.unparse(call) else []
    return found


MODULES = {name: ast.parse((ROOT / "hybrid_nb" / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")) for name in PLACE}


def bound(body: list[ast.stmt]) -> set[str]:
    "The names that statements define at the top level; imported ones do not count."
    names = set()
    for n in body:
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(n.name)
        elif isinstance(n, ast.If | ast.Try | ast.With):
            names |= bound(n.body) | bound(getattr(n, "orelse", []))
        elif isinstance(n, ast.Assign | ast.AnnAssign):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            names |= {t.id for place in targets for t in ast.walk(place) if isinstance(t, ast.Name)}
    return names


DEFINED = {name: bound(body.body) for name, body in MODULES.items()}


def exists(home: str, name: str | None) -> bool:
    "Whether an import finds what it takes where that is defined; of former modules, in one of those that they became."
    submodule = name is not None and f"{home}.{name}".strip(".") in {*PLACE, *PACKAGES, *FORMER}
    if name is None or submodule:
        return submodule or home in {"", *PLACE, *PACKAGES, *FORMER}
    if home == "":
        return name in DEFINED["__init__"] | set(PUBLIC) | {"__version__"} or name in FORMER
    homes = [home] if home in PLACE else FORMER.get(home, "").split()
    return name == "*" and bool(homes) or any(name in DEFINED[m] for m in homes)


def missing(node: ast.AST, module: str = "x.y") -> set[str]:
    "What import statements take from the package that is not there; code in strings that parses is read as well."
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    codes = [node]
    for text in texts:
        if re.search(r"(^|[;\n]) *(from|import) hybrid_nb", text):
            try:
                codes.append(ast.parse(text))
            except SyntaxError:  # prose, or a part of an f-string
                pass
    return {f"{home}.{name}" for code in codes for home, name in imports(code, module) if not exists(home, name)}


def users() -> Iterator[tuple[str, ast.AST]]:
    "All code that uses the package, but the package: cells that are not exported, pipelines, tests, hooks."
    for path in [*NOTEBOOKS, ROOT / "nbs" / "index.ipynb", *PIPELINES]:
        for cell in code_cells(path):
            if not re.match(r"#\|\s*export", cell["source"]) and not cell["source"].startswith("%%"):
                yield path.relative_to(ROOT).as_posix(), tree(cell["source"])
    for path in sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("hooks/*.py")]):
        if path != Path(__file__).resolve():  # it holds examples of what must not be
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def pairs(rule) -> set[tuple[str, str]]:
    "What a rule finds in all modules: module, and what it should not read."
    return {(module, name) for module, node in MODULES.items() for name in rule(node, module)}


def test_a_package_reads_packages_to_its_left_only():
    assert {pair for pair in pairs(upward) if pair[0] not in REGISTRY} == UPWARD


def test_cells_read_no_higher_number():
    for path in NOTEBOOKS[1:]:
        module = module_of(path)
        for cell in code_cells(path):
            read = {target(home, name) for home, name in imports(tree(cell["source"]), module)} - {None}
            assert not [name for name in read if PLACE.get(name, 0) > PLACE[module]], f"{path.stem}: {read}"


def test_no_experiment_reads_another():
    assert pairs(crossing) == CROSSING


def test_strings_name_modules_in_the_registry_only():
    assert {pair for pair in pairs(others_spelled) if pair[0] not in REGISTRY} == SPELLED | UPWARD
    assert {module for module, node in MODULES.items() if computed_imports(node)} == REGISTRY


def test_only_some_draw():
    drawing = {m for m, node in MODULES.items() if draws(node)}
    assert {m for m in drawing if m.split(".")[0] not in ("report", "experiments")} == {"study.figures"}


def test_only_some_write():
    writing = {m for m, node in MODULES.items() if writes(node)}
    assert writing - WRITERS == WRITING


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_imports_is_there(module):
    assert missing(MODULES[module], module) == set()


def test_what_users_import_is_there():
    assert {(where, name) for where, node in users() for name in missing(node)} == set()


def test_each_rule_can_fail():
    def found(rule, text, module="model.rope"):
        return rule(ast.parse(text), module)

    assert found(upward, "def f():\n    from ..cli.main import main") == {"cli.main"}
    assert found(upward, "from .hybrid import x\nfrom hybrid_nb import cli\nimport hybrid_nb.config.cast") == {"model.hybrid", "cli"}
    assert found(upward, "import_module('hybrid_nb.study.stats')") == {"study.stats"}
    assert found(upward, "run(['-m', 'hybrid_nb.train'])\nf'python -m hybrid_nb.cli.main {x}'") == {"train", "cli.main"}
    assert found(upward, "x = 'from hybrid_nb.pipeline import Result'") == {"pipeline"}
    assert found(upward, "from ..config.cast import cast\nfrom .orthogonal import x\n'metadata.hybrid_nb.cli.x'") == set()
    assert found(upward, '"hybrid_nb.cli.main in a docstring"') == set()
    assert found(crossing, "from .context import x\nfrom ..model.rope import y", "experiments.audit") == {"experiments.context"}
    assert found(crossing, "x = '-m hybrid_nb.experiments.parallel'", "experiments.parallel") == set()
    assert found(others_spelled, "f'hybrid_nb.{x}'") == {"*"}
    assert found(others_spelled, "x = ['hybrid_nb.model.rope', 'hybrid_nb.config.cast.cast']") == {"config.cast"}
    assert computed_imports(ast.parse("importlib.import_module(table[k])\nimport_module('peft')")) == ["importlib.import_module(table[k])"]
    assert draws(ast.parse("def f():\n    from matplotlib.axes import Axes")) and not draws(ast.parse("import numpy"))
    assert len(writes(ast.parse("open(p, 'wb')\np.open('r+')\nos.open(p, os.O_CREAT)\np.write_text('')\nopen(p, mode='a')"))) == 5
    assert writes(ast.parse("open(p)\nopen(p, 'rb')\nf.write('x')\nopen(os.devnull, 'w')")) == []
    assert found(missing, "from ..config.cast import cats") == {"config.cast.cats"}
    assert found(missing, "def f():\n    from hybrid_nb.modle import rope") == {"modle.rope"}
    assert found(missing, "run('from hybrid_nb.cli.main import nain; nain()')") == {"cli.main.nain"}
    assert found(missing, "from hybrid_nb.pipeline import Result\nfrom hybrid_nb import train, SRTE\nimport hybrid_nb.model.rope") == set()
