"""The size of cells and functions, what follows an exported cell, and code that stands twice.

The lists of exceptions only shrink: one that is no longer needed fails as well. `python tests/test_cells.py` prints today's findings.
"""

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

from test_repo import NOTEBOOKS, ROOT, tree

LONGEST = 60  # lines of a function, its signature included
SAME = 6  # consecutive lines that may not stand twice
SHOWN = 0.75  # the least share of exported cells that a visible cell follows
SHOWN_NEXT = 0.65  # and of those whose next code cell uses them: visible and not exported

# Exported cells with more than one public definition, by notebook.
CROWDED: dict[str, int] = {
    "model/04_attention": 1,
    "model/07_moe": 2,
    "model/08_foreign": 1,
    "model/09_texts": 3,
    "model/10_head": 1,
    "model/11_decoder": 2,
    "account/01_rates": 2,
    "account/02_params": 1,
    "account/03_flops": 2,
    "account/04_memory": 1,
    "account/05_plan": 2,
    "train/01_distributed": 3,
    "train/03_checkpoint": 4,
    "train/04_evaluate": 2,
    "train/05_optim": 2,
    "train/06_precision": 1,
    "train/07_signals": 1,
    "train/08_loop": 5,
    "train/09_teacher": 6,
    "train/10_distill": 5,
    "train/11_lora": 4,
    "train/12_parallel": 1,
    "train/13_timing": 1,
    "report/02_bundle": 2,
    "report/04_curves": 4,
    "report/05_monitors": 1,
    "report/06_verdict": 1,
    "report/07_run": 3,
    "report/10_result": 1,
    "report/11_page": 1,
    "report/12_index": 1,
    "report/13_publish": 1,
    "study/01_stats": 1,
    "study/03_study": 2,
    "study/04_tables": 3,
    "study/05_figures": 1,
    "study/06_trials": 1,
    "study/07_launch": 2,
    "study/09_findings": 3,
    "study/10_experiment": 1,
    "experiments/02_srte_convert": 2,
    "experiments/03_benchmark": 8,
    "experiments/04_qk_freeze": 9,
    "experiments/05_distill": 5,
    "experiments/06_context": 8,
    "experiments/07_finetune": 4,
    "experiments/08_parallel": 4,
    "experiments/09_projector": 13,
    "experiments/10_qk_speed": 6,
    "experiments/11_foundation": 7,
    "experiments/12_dense": 7,
    "experiments/13_audit": 12,
    "cli/02_command": 1,
    "cli/06_verify": 1,
    "cli/07_main": 2,
}
LONG: set[str] = set()
TWICE: set[str] = set()  # where the first of equal lines begin

MODULES = sorted(path for path in (ROOT / "hybrid_nb").rglob("*.py") if path.name != "_modidx.py")


def module_name(path: Path) -> str:
    "The dotted name of a module's file, without the package's."
    return ".".join(path.relative_to(ROOT / "hybrid_nb").with_suffix("").parts)


def cells_of(path: Path) -> list[dict]:
    "All cells of a notebook, each with its source in one string."
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def is_exported(cell: dict) -> bool:
    "True for a cell that nbdev exports and that does more than import."
    if cell["cell_type"] != "code" or not re.match(r"#\|\s*export", cell["source"]):
        return False
    return not all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree(cell["source"]).body)


def public(source: str) -> list[str]:
    "The public functions and classes that a cell defines at its top level."
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree(source).body if isinstance(node, defined) and not node.name.startswith("_")]


def is_shown(cell: dict) -> bool:
    "True for a cell that readers see and that is not exported."
    return not re.match(r"#\|\s*(export|hide)", cell["source"])


def shares(notebooks: list[list[dict]]) -> tuple[float, float]:
    "The shares of exported cells that a shown cell follows, and whose next code cell is a shown one."
    exported = followed = used = 0
    for cells in notebooks:
        for number, cell in enumerate(cells, 1):
            if is_exported(cell):
                after = cells[number:]
                exported += 1
                followed += bool(after) and is_shown(after[0])
                used += next((is_shown(other) for other in after if other["cell_type"] == "code"), False)
    return followed / exported, used / exported


def long_functions(source: str, longest: int = LONGEST) -> list[str]:
    "The functions and methods of more than so many lines."
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > longest]


def code_lines(source: str) -> list[tuple[int, str]]:
    "Numbers and texts of lines, less imports, signatures, docstrings, comments, `__all__`, and lines of under four characters."
    skip = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Import | ast.ImportFrom) or isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__":
            skip |= {*range(n.lineno, n.end_lineno + 1)}
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.body[0].lineno > n.lineno:
            skip |= {*range(n.lineno, n.body[0].lineno)}
        body = getattr(n, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            skip |= {*range(body[0].lineno, body[0].end_lineno + 1)}
    lines = [(number, " ".join(line.split())) for number, line in enumerate(source.splitlines(), 1) if number not in skip]
    return [(number, text) for number, text in lines if len(text) > 3 and not text.startswith("#")]


def repeated(sources: dict[str, str], same: int = SAME) -> dict[str, list[str]]:
    "Where equal consecutive lines of code begin: by the first place, as module and first line, all others."
    places = defaultdict(list)
    for module, source in sources.items():
        lines = code_lines(source)
        for start in range(len(lines) - same + 1):
            window = lines[start:start + same]
            places[tuple(text for _, text in window)].append(f"{module}: {window[0][1]}")
    return {first: others for first, *others in places.values() if others}


def sources() -> dict[str, str]:
    "The text of each module."
    return {module_name(path): path.read_text(encoding="utf-8") for path in MODULES}


def crowded() -> dict[str, int]:
    "How many exported cells of each notebook have more than one public definition."
    counts = {p: sum(is_exported(c) and len(public(c["source"])) > 1 for c in cells_of(p)) for p in NOTEBOOKS}
    return {path.relative_to(ROOT / "nbs").with_suffix("").as_posix(): n for path, n in counts.items() if n}


def too_long() -> set[str]:
    "The functions above LONGEST lines."
    return {f"{module}.{name}" for module, source in sources().items() for name in long_functions(source)}


def test_an_exported_cell_has_one_public_definition():
    assert crowded() == CROWDED


def test_what_is_exported_is_shown():
    followed, used = shares([cells_of(path) for path in NOTEBOOKS])
    assert followed >= SHOWN and used >= SHOWN_NEXT, (followed, used)


def test_functions_are_short():
    assert too_long() == LONG


def test_no_lines_stand_twice():
    assert set(repeated(sources())) == TWICE


def test_each_rule_can_fail():
    def cell(source, kind="code"):
        return {"cell_type": kind, "source": source}

    export, use, prose = cell("#| export\ndef f(): pass"), cell("f()"), cell("## More", "markdown")
    assert public("#| export\nN = 1\ndef f(): pass\ndef _g(): pass\nclass C: pass") == ["f", "C"]
    assert not is_exported(cell("#| export\nimport math")) and not is_exported(use) and is_exported(export)
    assert shares([[export, use, export, prose, export]]) == (2 / 3, 1 / 3)
    assert shares([[export, cell("#| hide\nf()")]]) == (0.0, 0.0)
    body = "".join(f"    x{n} = {n}\n" for n in range(SAME))
    function = f"def f(\n    a,\n):\n{body}"
    assert long_functions(function, SAME + 2) == ["f"] and long_functions(function, SAME + 3) == []
    assert repeated({"a": f"def f():\n{body}", "b": f"if 1:\n  # why\n{body}"}) == {"a: x0 = 0": ["b: x0 = 0"]}
    assert repeated({"a": f"def f():\n{body}", "b": f"def f():\n{body.replace('x5', 'y5')}"}) == {}
    signature = "".join(f"    a{n}: int,\n" for n in range(SAME))
    assert repeated({m: f"def {m}(\n{signature}):\n    'Give it.'\n    return '{m}'" for m in "ab"}) == {}


if __name__ == "__main__":
    table = "".join(f'    "{name}": {n},\n' for name, n in crowded().items())
    for text in (f"CROWDED: dict[str, int] = {{\n{table}}}", f"LONG = {too_long()}", f"TWICE = {repeated(sources())}",
                 f"shares = {shares([cells_of(path) for path in NOTEBOOKS])}"):
        print(text)
