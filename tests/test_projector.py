"""What notebook 11 cannot hold: a projector's file when its writer dies, several processes, and a report that is verified.

Run with `pytest tests/test_projector.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_nb.model.projector import KVDimensionProjector

BIN = Path(sys.executable).parent
CONFIGS = {"Qwen2.5-7B": {"d_model": 48, "num_layers": 2}}
DIE = """
import os, pathlib, signal, sys
from hybrid_nb.model import projector
real = projector.save_file
def halve(tensors, path, **more):
    real(tensors, path, **more)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
projector.save_file = halve
projector.KVDimensionProjector.load(sys.argv[1]).bfloat16().save(sys.argv[1])
"""
TWO = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hybrid_nb.model.projector import compute_kv_loss, KVDimensionProjector
from hybrid_nb.train.distributed import shutdown_and_exit
dist.init_process_group("gloo")
torch.manual_seed(0)
net = KVDimensionProjector({"Qwen2.5-7B": {"d_model": 48, "num_layers": 2}}, 32, dropout=0.0)
x, y = torch.randn(2, 2, 4, 7, 48), torch.randn(2, 2, 4, 7, 32)
def loss(module, rows):
    kv, ours = ([(t[0, i][rows], t[1, i][rows]) for i in range(2)] for t in (x, y))
    return compute_kv_loss(ours, module({"Qwen2.5-7B": kv}))
whole = torch.autograd.grad(loss(net, slice(4)), list(net.parameters()))
rank = dist.get_rank()
both = DistributedDataParallel(net)
loss(both, slice(2 * rank, 2 * rank + 2)).backward()
assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(net.parameters(), whole, strict=True))
shutdown_and_exit(0)  # gloo aborts now and then where an interpreter ends by itself
"""


def run(*words, **options) -> subprocess.CompletedProcess:
    "A finished process."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env=env, timeout=300, **options)


def test_a_dying_writer_leaves_the_old_file(tmp_path):
    file, before = tmp_path / "projector.safetensors", KVDimensionProjector(CONFIGS, 32)
    before.save(file)
    assert run(sys.executable, "-c", DIE, file).returncode == -9
    after = KVDimensionProjector.load(file, student_d_model=32)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    after.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "the next writer takes over what the dead one left"


def test_two_processes_share_one_projector(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = run(BIN / "torchrun", "--standalone", "--nproc-per-node=2", script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    "The report of the pipeline with one seed."
    folder = tmp_path_factory.mktemp("reports")
    pipeline = Path(__file__).resolve().parent.parent / "pipelines" / "projector.ipynb"
    done = run(BIN / "papermill", pipeline, folder / "projector.ipynb", "-p", "seeds", 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "projector.ipynb"


def test_the_report_is_verified(report):
    done = run(BIN / "hnb", "verify", report)
    assert done.returncode == 0, done.stderr


def test_an_altered_report_is_not(report, tmp_path):
    altered = tmp_path / report.name
    altered.write_bytes(report.read_bytes())
    altered.with_suffix(".json").write_text(report.with_suffix(".json").read_text().replace('"7.864 M"', '"7.9 M"'))
    done = run(BIN / "hnb", "verify", altered)
    assert done.returncode == 65 and "table claims" in done.stderr
