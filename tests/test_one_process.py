"""Notebooks that run in one process, as `nbdev_test` has them do: what one defines does not replace what the package has registered."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_repo import ROOT, code_cells

REGISTERING = ("custom_op(", "register_model(", ".register(")
PROGRAM = """
import sys
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from hybrid_nb import get_config
from hybrid_nb.model import decoder, hybrid

for cell in sys.stdin.read().split("\\0"):
    exec(cell, globals())

for module, config in ((decoder, "DecoderConfig"), (hybrid, "HybridLanguageModelConfig")):
    packaged = getattr(module, config)
    assert CONFIG_MAPPING[packaged.model_type] is packaged, CONFIG_MAPPING[packaged.model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING[packaged].__module__ == module.__name__
for preset in ("hybrid-smoke", "moe-smoke"):
    ids = torch.randint(0, 100, (2, 40))
    model = hybrid.make_model(get_config(preset).model)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
"""


def exported(path: Path) -> list[str]:
    "The exported cells of a notebook."
    return [c["source"] for c in code_cells(path) if c["source"].startswith("#| export")]


def registering() -> list[Path]:
    "The notebooks of models with a cell that registers something for the whole process."
    return [p for p in sorted((ROOT / "nbs" / "model").glob("*.ipynb")) if any(w in cell for cell in exported(p) for w in REGISTERING)]


def run(cells: list[str]) -> subprocess.CompletedProcess:
    "Execute cells as a notebook, after the package, and then use the package."
    return subprocess.run([sys.executable, "-c", PROGRAM], input="\0".join(cells), cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("notebook", registering(), ids=lambda p: p.stem)
def test_a_notebook_leaves_the_package_as_it_is(notebook):
    done = run(exported(notebook))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_check_has_teeth():
    cells = exported(ROOT / "nbs" / "model" / "11_decoder.ipynb")
    bad = [*cells, 'AutoConfig.register(DecoderConfig.model_type, DecoderConfig, exist_ok=True)']
    assert "AssertionError" in run(bad).stderr
