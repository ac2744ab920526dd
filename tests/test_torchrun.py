"""Two processes under torchrun: the losses of one, uneven targets, stopping, resuming, and what goes wrong on one rank.

Run with `pytest tests/test_torchrun.py`. torchrun itself starts three times; the other cases fork the two ranks.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import driver
import pytest
import torch
import torch.nn.functional as F
from driver import Process, events, one_thread, result, start, tiny, trained, tree, wait_for
from safetensors.torch import load_file

from hybrid_nb.config import errors
from hybrid_nb.config.config import to_yaml
from hybrid_nb.model.decoder import make_decoder
from hybrid_nb.runs import files
from hybrid_nb.runs.runs import Run, load_run
from hybrid_nb.train import launch, optim
from hybrid_nb.train.checkpoint import checkpoints, read_checkpoint

SAME = {"dropout": 0.0, "attn_dropout": 0.0, "log_interval": 1, "steps": 24, "save_interval": 24, "eval_interval": 12}
ONE, TWO = tiny(**SAME, grad_accum=2), tiny(**SAME, grad_accum=1, workers=1)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    "A folder for this module's runs and prepared text."
    with one_thread():
        yield tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def command(work):
    "The arguments of `python -m hybrid_nb.train` for a run of two ranks."
    (work / "two.yaml").write_text(to_yaml(TWO))
    here = ["--config", work / "two.yaml", "--cache", work / "cache", "--device", "cpu"]
    return lambda name: [*here, "--folder", work / name]


def torchrun(*argv) -> subprocess.Popen:
    "torchrun on two processes, in a session of its own."
    return subprocess.Popen([*TORCHRUN, *map(str, argv)], env=driver.ENV, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, start_new_session=True)


def two(argv: list, *faults: tuple, ranks: int = 2) -> list[Process]:
    "The two ranks, or another number, as torchrun would start them, forked."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(argv, *faults, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(ranks)]


def ended(processes: list[Process]) -> list[int]:
    return [p.wait() for p in processes]


@pytest.fixture(scope="module")
def whole(work, command) -> Run:
    "An uninterrupted run under torchrun."
    process = torchrun("-m", "hybrid_nb.train", *command("whole"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return load_run(work / "whole")


@pytest.fixture(scope="module")
def single(work) -> Run:
    "The same global batches in one process."
    return launch.train(ONE, work / "single", device="cpu", cache=work / "cache")


def gap(a: Run, b: Run, kind: str, key: str) -> float:
    "The largest difference of a figure over all its records."
    pairs = zip(a.records(kind), b.records(kind), strict=True)
    return max(abs(x[key] - y[key]) for x, y in pairs)


def test_two_processes_lose_what_one_loses(whole, single, work, command):
    assert whole.info["world_size"] == 2 and whole.info["tokens_seen"] == single.info["tokens_seen"]
    assert len(whole.records("train")) == SAME["steps"]
    assert gap(whole, single, "train", "loss") < 1e-5
    assert gap(whole, single, "train", "grad_norm") < 1e-4 and gap(whole, single, "eval", "val_loss") < 1e-5
    a, b = (load_file(r.path / "model/model.safetensors") for r in (whole, single))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-3

    assert ended(two(command("naive"), ("same batches",))) == [0, 0]
    assert gap(load_run(work / "naive"), single, "train", "loss") > 1e-3, "the negative control"


def test_two_processes_train_a_hybrid_model(work):
    "Its gates' losses are means over samples, so that they too are those of the whole batch."
    same = SAME | {"branch_dropout": 0.0, "steps": 10}
    (work / "hybrid.yaml").write_text(to_yaml(driver.tiny_hybrid(**same, grad_accum=1)))
    argv = ["--config", work / "hybrid.yaml", "--cache", work / "cache", "--device", "cpu", "--folder", work / "hybrid"]
    assert ended(two(argv)) == [0, 0]
    one = launch.train(driver.tiny_hybrid(**same, grad_accum=2), work / "hybrid-one", device="cpu", cache=work / "cache")
    both = load_run(work / "hybrid")
    assert gap(both, one, "train", "loss") < 1e-5 and gap(both, one, "eval", "val_loss") < 1e-5
    assert gap(both, one, "train", "grad_norm") < 1e-4


def test_sigterm_to_torchrun_stops_and_resumes(whole, work, command):
    "With processes that prepare batches, which torchrun's signal reaches too."
    slow = json.dumps(driver.job(command("halted"), ("slow",)))
    process = torchrun(driver.__file__, slow)
    wait_for(lambda: trained(work / "halted", 3), 120)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    stopped = load_run(work / "halted")
    assert stopped.info["status"] == "stopped" and events(stopped, "stop") == ["SIGTERM asked to stop"], err
    assert 3 <= read_checkpoint(checkpoints(stopped.path)[0]).step < SAME["steps"]

    process = torchrun("-m", "hybrid_nb.train", *command("halted"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert result(load_run(work / "halted")) == result(whole)


def test_a_finished_run_says_so_once(whole, command):
    before = tree(whole.path)
    ranks = two(command("whole"))
    assert ended(ranks) == [0, 0]
    assert [p.out for p in ranks] == [f"{whole.path.name} is finished: nothing to do\n", ""]
    assert tree(whole.path) == before


def test_a_signal_to_one_rank_stops_both(whole, work, command):
    ranks = two(command("one"), ("slow",))
    wait_for(lambda: trained(work / "one", 3))
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [errors.STOPPED] * 2
    assert events(load_run(work / "one"), "stop") == ["another process asked to stop"]
    assert ended(two(command("one"))) == [0, 0]
    assert result(load_run(work / "one")) == result(whole)


def test_nan_on_one_rank_stops_both(whole, work, command):
    ranks = two(command("nan"), ("nan gradient", 5, 1))
    assert ended(ranks) == [errors.NUMERIC] * 2
    assert "gradient norm nan at step 6, batch " in ranks[0].err
    failed = load_run(work / "nan")
    assert failed.info["status"] == "failed" and checkpoints(failed.path)[0].name == "step-5"
    assert ended(two(command("nan"))) == [0, 0]
    assert result(load_run(work / "nan")) == result(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(whole, work, command, rank):
    "In one line that says which; the run is shown as interrupted, whoever was there to write it down."
    name = f"killed-{rank}"
    ranks = two(command(name), ("slow",))
    wait_for(lambda: trained(work / name, 3))
    assert load_run(work / name).info["status"] == "running"
    os.kill(ranks[rank].pid, signal.SIGKILL)
    other = 1 - rank
    codes = ended(ranks)
    assert (codes[rank], codes[other]) == (-signal.SIGKILL, errors.STOPPED), ranks[other].err
    assert ranks[other].err == f"RunError: process {rank} of 2 ended; the same command continues\n"
    left = load_run(work / name)
    assert left.info["status"] == "interrupted" and left.info["error"].endswith(" ended; the same command continues")
    assert "gloo" not in (left.path / "run.json").read_text()
    assert ended(two(command(name))) == [0, 0]
    assert result(load_run(work / name)) == result(whole)


def test_what_one_rank_cannot_read_all_pass_over(work, command):
    "The checkpoint to continue from is chosen by all."
    config = work / "often.yaml"
    config.write_text(to_yaml(replace(TWO, train=replace(TWO.train, steps=8, save_interval=3, eval_interval=8, workers=0))))
    argv = [config if a == work / "two.yaml" else a for a in command("unread")]
    assert ended(two(argv, ("kill step", 7))) == [-signal.SIGKILL] * 2
    shutil.copytree(work / "unread", work / "read")
    assert ended(two(argv, ("unreadable", 6, 1))) == [0, 0]
    assert ended(two([work / "read" if a == work / "unread" else a for a in argv])) == [0, 0]
    one, both = load_run(work / "unread"), load_run(work / "read")
    assert result(one) == result(both)
    assert events(both, "resume") == ["continued from step 6"]
    assert events(one, "resume") == ["checkpoint checkpoints/step-6 cannot be read by another process", "continued from step 3"]


MOVED = {"steps": 9, "save_interval": 3, "eval_interval": 9}


@pytest.mark.parametrize("turns", [(1, 2, 1), (2, 1, 4)], ids=str)
def test_another_number_of_processes_keeps_the_global_batch(work, turns):
    "Killed and continued by other numbers of processes, a run reads the windows of the uninterrupted one and learns from them the same."
    config = tiny(**SAME | MOVED, grad_accum=2 // turns[0])
    path, name = work / f"moved-{turns[0]}.yaml", f"moved-{turns[0]}"
    path.write_text(to_yaml(config))
    argv = ["--config", path, "--cache", work / "cache", "--device", "cpu", "--folder", work / name]
    for ranks, kill in zip(turns, (4, 7, None), strict=True):
        processes = two(argv, *([("kill step", kill)] if kill else []), ranks=ranks) if ranks > 1 else [
            start(argv, *([("kill step", kill)] if kill else []))]
        assert ended(processes) == [-signal.SIGKILL if kill else 0] * ranks, processes[0].err
    moved = load_run(work / name)
    one = launch.train(tiny(**SAME | MOVED, grad_accum=2), work / "unmoved", device="cpu", cache=work / "cache")
    for key in ("data_hash", "tokens_seen", "global_batch"):
        assert moved.info[key] == one.info[key], key
    assert gap(moved, one, "train", "loss") < 1e-5 and gap(moved, one, "eval", "val_loss") < 1e-5
    a, b = (load_file(r.path / "model/model.safetensors") for r in (moved, one))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-3
    assert any("32 windows an update as before" in note for note in events(moved, "resume"))


def test_a_number_of_processes_that_cannot_share_is_refused(work, single):
    "And the line says what would work."
    path = work / "one.yaml"
    path.write_text(to_yaml(tiny(**SAME | MOVED, grad_accum=2)))
    argv = ["--config", path, "--cache", work / "cache", "--device", "cpu", "--folder", work / "uneven"]
    assert start(argv, ("kill step", 4)).wait() == -signal.SIGKILL
    ranks = two(argv, ranks=3)
    assert ended(ranks) == [errors.USAGE] * 3
    line = "RunError: 3 processes cannot share the 32 windows of an update of this run evenly; 1, 2, 4, 8, 16 can\n"
    assert [p.err for p in ranks] == [line] * 3


def test_a_folder_in_use_is_refused(work, command):
    (work / "used").mkdir()
    with files.locked(work / "used"):
        ranks = two(command("used"))
        codes = ended(ranks)
    assert codes == [errors.USAGE, errors.STOPPED]
    assert ranks[1].err == "RunError: process 0 of 2 ended; the same command continues\n"
    assert f"is in use by process {os.getpid()}" in ranks[0].err


def test_uneven_targets_weigh_by_targets(work):
    "The loss, the gradient and the update of two ranks are those of all their targets at once."
    assert ended(two([], ("uneven update", work))) == [0, 0]
    first, second = (load_file(work / f"rank-{r}.safetensors") for r in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)

    x, y = (t.reshape(8, 8) for t in driver.uneven_batch())
    torch.manual_seed(0)
    model = make_decoder(driver.UNEVEN.model)
    logits = model(x).logits
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), driver.UNEVEN.train.grad_clip)
    optimizer = optim.make_optimizer(model, driver.UNEVEN.train)
    for group in optimizer.param_groups:
        group["lr"] = optim.lr_at(driver.UNEVEN.train, 0)
    optimizer.step()
    assert int((y != -100).sum()) == 27 and norm > driver.UNEVEN.train.grad_clip
    assert abs(first["loss"] - loss) < 1e-6 and abs(first["norm"] - norm) < 1e-5
    assert max(float((first[n] - p.detach()).abs().max()) for n, p in model.named_parameters()) < 1e-6

    halves = [F.cross_entropy(logits[i].flatten(0, 1), y[i].flatten()) for i in ([0, 1, 4, 5], [2, 3, 6, 7])]
    assert abs(sum(halves) / 2 - loss) > 1e-3, "the negative control: a mean of means"
