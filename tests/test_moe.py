"""A decoder with experts in whole runs: stopped and resumed bit for bit, and on two processes.

Run with `pytest tests/test_moe.py`.
"""

import os
import signal

import driver
import pytest
from driver import one_thread, result
from test_torchrun import SAME, ended, gap, two

from hybrid_nb.config.config import to_yaml
from hybrid_nb.runs.runs import load_run
from hybrid_nb.train import launch, loop, optim

EXPERTS = {"ffn": "swiglu", "norm": "rmsnorm", "n_routed_experts": 4, "n_shared_experts": 1, "moe_d_ff": 24, "moe_layers": 1,
           "aux_loss_alpha": 0.5}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder for this module's runs and prepared text."
    with one_thread():
        yield tmp_path_factory.mktemp("moe")


def shares(run) -> list:
    return [r["share"] for r in run.records("routing")]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "gradient_checkpointing": True, "seq_aux": False}], ids=str)
def test_resuming_is_bit_for_bit(work, changes, monkeypatch):
    config, name, real = driver.tiny(**EXPERTS | changes), "-".join(changes) or "plain", optim.update
    whole = launch.train(config, work / f"{name}-whole", device="cpu", cache=work / "cache")

    def update(*args):
        found = real(*args)
        if args[6] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", update)
        assert launch.train(config, work / name, device="cpu", cache=work / "cache").info["status"] == "stopped"
    again = launch.train(config, work / name, device="cpu", cache=work / "cache")
    assert result(again) == result(whole)
    assert shares(again) == shares(whole) and all(len(layers) == 1 and abs(sum(layers[0]) - 1) < 1e-5 for layers in shares(whole))


@pytest.mark.parametrize("seq_aux", [True, False])
def test_two_processes_train_experts(work, seq_aux):
    "The balance is that of the whole batch: in each sequence as a mean over sequences, in the batch by counting first."
    same = SAME | EXPERTS | {"steps": 10, "seq_aux": seq_aux, "eval_batches": 0}
    name = "two" if seq_aux else "two-batch"
    size = driver.tiny().train.batch_size
    (work / f"{name}.yaml").write_text(to_yaml(driver.tiny(**same, grad_accum=2, batch_size=size // 2)))
    argv = ["--config", work / f"{name}.yaml", "--cache", work / "cache", "--device", "cpu", "--folder", work / name]
    assert ended(two(argv)) == [0, 0]
    one = launch.train(driver.tiny(**same, grad_accum=1, batch_size=2 * size), work / f"{name}-one", device="cpu", cache=work / "cache")
    both = load_run(work / name)
    assert gap(both, one, "train", "loss") < 1e-5 and gap(both, one, "eval", "val_loss") < 1e-5
    assert gap(both, one, "train", "grad_norm") < 1e-4
