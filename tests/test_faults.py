"""The promises of a run, tried for real: resuming bit for bit, kills, signals, NaN, full disks, flipped bits, secrets.

Run with `pytest tests/test_faults.py`. A process that is to die is a real one; each fault is also played to a naive
program, which must fail it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from driver import KILL_STEP, KILLS, Process, start
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hybrid_nb import runs, train
from hybrid_nb.config import Config, get_config, to_yaml
from hybrid_nb.data import batch_hash, load_tokens
from hybrid_nb.decoder import make_decoder
from hybrid_nb.runs import (BAD_DATA, IO, NUMERIC, STOPPED, USAGE, Run, RunError, checkpoints, latest_checkpoint, load_run,
                            read_checkpoint, tensor_hash)

N = 16  # steps; an epoch ends inside the thirteenth
TINY = {"n_layer": 2, "d_model": 32, "n_head": 2, "d_ff": 64, "vocab_size": 400, "max_seq_len": 32, "dropout": 0.1, "attn_dropout": 0.1,
        "seq_len": 32, "batch_size": 16, "grad_accum": 2, "steps": N, "warmup_steps": 4, "lr": 0.01, "grad_clip": 0.2, "log_interval": 3,
        "eval_interval": 5, "eval_batches": 2, "save_interval": 4, "precision": "fp32", "compile": "no", "bpe_vocab": 400,
        "grammar_stories": 30, "valid_fraction": 0.2}
TIMES = {"tokens_per_s", "memory_gib", "elapsed_s"}


def tiny(**changes) -> Config:
    return get_config("smoke", TINY | changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The results of a number of threads are compared with those of the same number: one, as in the processes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "matmul_rate", lambda dtype, device: 1e9)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    "Where the text of these tests is prepared once."
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def run(tmp_path, cache):
    "A function that trains in this process: `run(config, name, stop=k)` is asked by SIGTERM to stop after step k."
    def begin(config: Config = tiny(), name: str = "r", stop: int | None = None) -> Run:  # noqa: B008
        real = train.update

        def update(*args):
            result = real(*args)
            if stop == args[6] + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "update", update)
            return train.train(config, tmp_path / name, device="cpu", cache=cache)

    return begin


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, cache):
    "Uninterrupted runs, each made once: `wholes(config)`."
    made, folder = {}, tmp_path_factory.mktemp("whole")

    def whole(config: Config = tiny()) -> Run:  # noqa: B008
        if config not in made:
            made[config] = train.train(config, folder / f"r{len(made)}", device="cpu", cache=cache)
        return made[config]

    return whole


def result(run: Run) -> dict:
    "All that a run came to but its timings."
    last = read_checkpoint(checkpoints(run.path)[0])
    progress = {k: v for k, v in last.state["progress"].items() if k not in ("elapsed_s", "busy_s", "busy_tokens")}
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in run.records() if r["kind"] != "event"]
    return {"status": run.info["status"], "weights": run.info["weights"], "data": run.info["data_hash"], "tokens": run.info["tokens_seen"],
            "groups": {g: tensor_hash(t) for g, t in last.groups.items()}, "progress": progress, "scaler": last.state["scaler"],
            "records": records, "model": runs.sha256_file(run.path / "model/model.safetensors")}


def events(run: Run, name: str) -> list[str]:
    return [r["detail"] for r in run.records("event") if r["event"] == name]


def tree(folder: Path) -> dict:
    "Every file with its content and times."
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [folder, *folder.rglob("*")]}


def flip(path: Path, at: int = -1, bit: int = 0):
    "Flip one bit of a file."
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def refused(action, code: int, *parts: str) -> str:
    "The one line with which an action is refused."
    with pytest.raises(RunError) as caught:
        action()
    message = str(caught.value)
    assert caught.value.exit_code == code and "\n" not in message
    for part in parts:
        assert part in message
    return message


# Resuming


def epoch_steps(run: Run) -> int:
    "Whole steps in the first epoch."
    t = run.config.train
    return (run.info["data"]["train_tokens"] - 1) // t.seq_len // (t.batch_size * t.grad_accum)


@pytest.mark.parametrize("stops", [(1,), (6,), ("last",), ("next",), (N - 1,), (6, "next"), (1, "last", N - 1)], ids=str)
def test_resuming_is_bit_for_bit(run, wholes, stops):
    whole = wholes()
    last = epoch_steps(whole)
    assert 6 < last < N - 2 and all(r["grad_norm"] > whole.config.train.grad_clip for r in whole.records("train"))
    for stop in ({"last": last, "next": last + 1}.get(s, s) for s in stops):
        stopped = run(stop=stop)
        assert stopped.info["status"] == "stopped" and checkpoints(stopped.path)[0].name == f"step-{stop}"
    assert result(run()) == result(whole)


@pytest.mark.parametrize("changes", [
    {"precision": "bf16"}, {"precision": "fp16", "batch_size": 4}, {"tie_embeddings": False, "workers": 1},
    {"q": "frozen-orthogonal", "k": "frozen-orthogonal", "v": "frozen-gaussian", "ortho_shared": True}], ids=str)
def test_resuming_other_configurations(run, wholes, changes):
    config = tiny(**changes)
    run(config, stop=5)
    run(config, stop=13)
    assert result(run(config)) == result(wholes(config))


def test_saving_does_not_change_the_run(wholes):
    always, never = result(wholes(tiny(save_interval=1))), result(wholes(tiny(save_interval=N)))
    assert always == never == result(wholes())


def fresh_optimizer(patch):
    real = train._unpack
    patch.setattr(train, "_unpack", lambda groups, model, optimizer: (real(groups, model, optimizer), optimizer.state.clear()))


def first_batch_again(patch):
    real = train.loader
    patch.setattr(train, "loader", lambda data, t, start, stop, *rest: real(data, t, 0, stop - start, *rest))


def forgotten_log(patch):
    real = train.Progress
    patch.setattr(train, "Progress", lambda **state: real(**(state | ({"loss_sum": 0.0, "loss_count": 0} if state else {}))))


@pytest.mark.parametrize("naive", [fresh_optimizer, first_batch_again, forgotten_log])
def test_naive_resuming_ends_elsewhere(run, wholes, monkeypatch, naive):
    run(stop=7)
    naive(monkeypatch)
    other, whole = result(run()), result(wholes())
    assert other["tokens"] == whole["tokens"]
    differ = {key for key in whole if other[key] != whole[key]}
    assert differ >= {fresh_optimizer: {"weights", "groups", "records", "model"}, first_batch_again: {"weights", "data", "records"},
                      forgotten_log: {"records"}}[naive]


# Processes that die


@pytest.fixture
def command(tmp_path, cache):
    "The arguments of `python -m hybrid_nb.train` for a configuration and a run folder."
    def arguments(config: Config = tiny(), folder: Path | None = None) -> list[str]:  # noqa: B008
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config))
        return ["--config", str(path), "--run", str(folder or tmp_path / "r"), "--cache", str(cache), "--device", "cpu"]

    return arguments


def real_process(argv: list[str]) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "hybrid_nb.train", *argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(what, seconds: float = 60):
    "Wait until a function is true."
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def one_line(process: Process, *parts: str):
    "What went wrong is told in one line of stderr."
    assert len(process.err.splitlines()) == 1, process.err
    for part in parts:
        assert part in process.err


LEFT = {  # the newest checkpoint and the temporary folders that a kill leaves
    "temporary directory": (4, {".tmp-step-8"}), "mid-write": (4, {".tmp-step-8"}), "before manifest": (4, {".tmp-step-8"}),
    "before rename": (4, {".tmp-step-8"}), "after rename": (8, set()), "mid-rotation": (12, {".tmp-old-step-4"}), "mid-step": (8, set()),
    "mid-record": (8, set()), "finished model": (16, set()), "before done": (16, set())}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_run_again(tmp_path, command, wholes, point):
    folder = tmp_path / "r"
    assert start(command(), ("kill", point)).wait() == -signal.SIGKILL
    step, temporary = LEFT[point]
    assert load_run(folder).info["status"] == "running"
    assert checkpoints(folder)[0].name == f"step-{step}"
    assert {p.name for p in (folder / "checkpoints").glob(".tmp-*")} == temporary
    again = start(command())
    assert again.wait() == 0, again.err
    assert result(load_run(folder)) == result(wholes())
    assert events(load_run(folder), "resume") == [f"continued from step {step}"]
    assert not list(folder.rglob(".tmp-*")), "what the kill left behind is gone"


def test_killed_again_and_again(tmp_path, command, wholes):
    for step in (2, 6, 14):
        assert start(command(), ("kill step", step)).wait() == -signal.SIGKILL
    assert start(command()).wait() == 0
    assert result(load_run(tmp_path / "r")) == result(wholes())


def test_writing_in_place_loses_the_checkpoint_to_a_kill(tmp_path):
    "The negative control: written over, the old checkpoint is gone and the new one is half."
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    os.truncate(path, path.stat().st_size // 2)  # what a kill amid the next writing leaves
    with pytest.raises(SafetensorError):
        load_file(path)


def test_a_kill_frees_the_folder_though_workers_live_on(tmp_path, command, wholes):
    config = tiny(workers=1)
    killed = start(command(config), ("kill step", 6))
    assert killed.wait() == -signal.SIGKILL
    again = start(command(config))
    assert again.wait() == 0, again.err
    assert result(load_run(tmp_path / "r")) == result(wholes())


# Signals


def trained(folder: Path, step: int) -> bool:
    return any(r["kind"] == "train" and r["step"] >= step for r in runs.read_records(folder))


def test_signals_stop_and_the_same_command_continues(tmp_path, command, wholes):
    "One folder's life: SIGTERM, a rival, SIGINT, the end, and once more; the real command first and last."
    folder, config = tmp_path / "r", tiny()
    process = real_process(command(config))
    wait_for((folder / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (STOPPED, "", "")
    stopped = load_run(folder)
    assert (stopped.info["status"], events(stopped, "stop")) == ("stopped", ["SIGTERM asked to stop"])
    step = read_checkpoint(checkpoints(folder)[0]).step
    assert 1 <= step < N - 6 and stopped.info["error"] == f"stopped at step {step} of {N}; the same command continues"

    process = start(command(config), ("slow",))
    wait_for(lambda: trained(folder, step + 1))
    rival = start(command(config))
    assert rival.wait() == USAGE
    one_line(rival, f"run folder {folder} is in use by process {process.pid}")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == STOPPED
    assert step < read_checkpoint(checkpoints(folder)[0]).step < N
    assert events(load_run(folder), "stop")[1:] == ["SIGINT asked to stop"]

    process = real_process(command(config))
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)
    assert result(load_run(folder)) == result(wholes())
    before = tree(folder)
    again = start(command(config))
    assert again.wait() == 0 and again.out == f"{folder} is finished: nothing to do\n"
    assert tree(folder) == before


def test_signals_to_the_whole_group_and_twice(tmp_path, command, wholes):
    "A scheduler's SIGTERM reaches the processes that prepare batches too, and by way of torchrun comes again."
    config = tiny(workers=1)
    process = start(command(config), ("slow",))
    wait_for(lambda: trained(tmp_path / "r", 3))
    os.killpg(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == STOPPED, process.err
    assert start(command(config)).wait() == 0
    assert result(load_run(tmp_path / "r")) == result(wholes())


def test_without_handlers_a_signal_loses_the_steps(tmp_path, command):
    "The negative control."
    process = start(command(), ("no handlers",), ("slow",))
    wait_for(lambda: trained(tmp_path / "r", 3))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert len(checkpoints(tmp_path / "r")) <= 1 and load_run(tmp_path / "r").info["status"] == "running"


# Numbers that are none


def spoil_loss(model, monkeypatch):
    real = model.forward

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        out.loss = out.loss * float("inf")
        return out

    monkeypatch.setattr(model, "forward", forward)


def spoil_gradient(model, monkeypatch):
    next(model.parameters()).register_hook(lambda g: g * float("nan"))


@contextmanager
def spoiled(spoil, step: int):
    "Something wrong with the update that follows `step` others."
    real = train.update
    with pytest.MonkeyPatch.context() as patch:
        def update(model, *args):
            if args[5] == step:
                spoil(model, patch)
            return real(model, *args)

        patch.setattr(train, "update", update)
        yield


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_number_that_is_none_stops_before_the_update(run, wholes, spoil, cache):
    config = tiny()
    with spoiled(spoil, 6):
        message = refused(lambda: run(config, "spoiled"), NUMERIC, "at step 7", "the parameters of step 6 are kept",
                          {spoil_loss: "loss inf", spoil_gradient: "gradient norm nan"}[spoil])
    data = load_tokens(next(cache.glob("tokens-*")))
    assert batch_hash(*data.batch(6, config.train))[:16] in message
    there, good = load_run(run(config, "good", stop=6).path.parent / "spoiled"), run(config, "good", stop=7)
    assert there.info["status"] == "failed" and message.endswith(there.info["error"]) and events(there, "nonfinite") == [there.info["error"]]
    kept, expected = read_checkpoint(checkpoints(there.path)[0]), read_checkpoint(good.path / "checkpoints/step-6")
    assert kept.step == 6
    for group in ("model", "optimizer"):
        assert tensor_hash(kept.groups[group]) == tensor_hash(expected.groups[group])
    assert result(run(config, "spoiled")) == result(wholes())


def test_the_process_says_so_in_one_line(tmp_path, command, wholes):
    process = start(command(), ("nan gradient", 6))
    assert process.wait() == NUMERIC
    one_line(process, "gradient norm nan at step 7, batch ")
    assert start(command()).wait() == 0
    assert result(load_run(tmp_path / "r")) == result(wholes())


def test_a_naive_update_spoils_every_parameter(run, monkeypatch):
    "The negative control: the same fault, without the check."
    monkeypatch.setattr(train, "math", type("math", (), {"isfinite": lambda x: True, "cos": train.math.cos, "pi": train.math.pi}))
    monkeypatch.setattr(train, "sample_text", lambda *a, **k: "")
    with spoiled(spoil_gradient, 6):
        spoiled_run = run(stop=7)
    weights = read_checkpoint(checkpoints(spoiled_run.path)[0]).groups["model"]
    assert all(t.isnan().all() for t in weights.values())


# fp16


HALF = {"precision": "fp16", "batch_size": 2, "grad_accum": 1}


@pytest.fixture
def scale(monkeypatch):
    "A function that sets the scale with which fp16 starts."
    def begin(value: float):
        real = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, init_scale, enabled: real(device, init_scale=value, enabled=enabled))

    return begin


def untouched(run: Run) -> bool:
    "Whether the newest checkpoint holds the parameters that the run began with."
    torch.manual_seed(run.config.train.seed)
    begin = make_decoder(run.config.model).state_dict()
    return all(torch.equal(t, begin[name]) for name, t in latest_checkpoint(run.path)[0].groups["model"].items())


def test_overflow_is_skipped_and_counted(run, scale):
    scale(2.0**28)
    config = tiny(**HALF)
    whole = run(config, "whole")
    told = events(whole, "overflow")
    last = read_checkpoint(checkpoints(whole.path)[0])
    assert 3 <= len(told) < N - 4 and told[0] == f"fp16 overflow: update skipped, scale now {2.0**27:g}"
    assert {float(t) for n, t in last.groups["optimizer"].items() if n.endswith(".step")} == {N - len(told)}
    assert last.state["scaler"]["scale"] == 2.0 ** (28 - len(told)) and last.state["progress"]["overflows"] == 0

    stopped = run(config, "halted", stop=2)
    assert read_checkpoint(checkpoints(stopped.path)[0]).state["progress"]["overflows"] == 2
    assert untouched(stopped)
    resumed = run(config, "halted")
    assert result(resumed) == result(whole) and events(resumed, "overflow") == told

    forgetful = run(config, "naive", stop=2)  # the negative control: a scale that resuming forgets
    with pytest.MonkeyPatch.context() as patch:
        real = train._restore
        patch.setattr(train, "_restore", lambda folder, identity, model, optimizer, scaler: real(
            folder, identity, model, optimizer, torch.amp.GradScaler("cpu", 1.0, scaler.is_enabled())))
        forgetful = run(config, "naive")
    assert result(forgetful)["weights"]["final"] != result(whole)["weights"]["final"]


def test_twenty_overflows_in_a_row_stop(run, scale):
    scale(2.0**100)
    config = tiny(**HALF | {"steps": 24, "eval_interval": 24, "save_interval": 9})
    run(config, stop=10)
    message = refused(lambda: run(config), NUMERIC, "fp16 overflowed 20 times in a row, last at step 20")
    stopped = load_run(run(tiny(), "other", stop=1).path.parent / "r")
    assert stopped.info["status"] == "failed" and message.endswith(stopped.info["error"]) and len(events(stopped, "overflow")) == 20
    kept = read_checkpoint(checkpoints(stopped.path)[0])
    assert kept.step == 20 and untouched(stopped)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    "A disk of its own, of 4 MiB, where this user may mount one."
    there = tmp_path / "disk"
    there.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", there], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield there
    subprocess.run(["umount", "-l", there], check=True)


FULL = {"checkpoint": ("checkpoint", 100), "record": ("record", 0), "model": ("model", 8), "tokenizer": ("tokenizer", 0)}


@pytest.mark.parametrize("file", FULL)
def test_full_disk(small_disk, command, wholes, file):
    "Another program fills the disk: one line, the last good checkpoint as it was, and room is all that is missing."
    folder = small_disk / "r"
    when, left = FULL[file]
    argv = command(folder=folder)
    full = start(argv, ("fill disk", small_disk, when, left))
    assert full.wait() == IO, full.err
    one_line(full, str(folder), "No space left on device")
    good, skipped = latest_checkpoint(folder)
    assert (good.step, skipped) == ({"checkpoint": 4, "record": 8}.get(when, N), [])
    files = {p.name: p.read_bytes() for p in good.path.iterdir()}
    (small_disk / "filler").unlink()
    again = start(argv)
    assert again.wait() == 0, again.err
    assert result(load_run(folder)) == result(wholes())
    assert events(load_run(folder), "resume") == [f"continued from step {good.step}"]
    assert good.path.exists() is (good.step == N) or files == {p.name: p.read_bytes() for p in good.path.iterdir()}


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("owner, name, fault", [
    ("safetensors.torch", "save_file", no_room_in_rust), ("hybrid_nb.runs", "write_file", no_room), ("os", "rename", no_room)])
def test_full_disk_pretended(run, wholes, monkeypatch, owner, name, fault):
    "The same where nothing can be mounted: the second checkpoint meets a full disk."
    kept = run(stop=4)
    before = tree(kept.path / "checkpoints/step-4")
    with monkeypatch.context() as patch:
        module = sys.modules[owner]
        real = getattr(module, name)
        patch.setattr(module, name, lambda *a, **k: (fault if "step-8" in "".join(map(str, a)) else real)(*a, **k))
        refused(run, IO, "cannot save the checkpoint of step 8", "No space left on device")
    assert tree(kept.path / "checkpoints/step-4") == before and [p.name for p in (kept.path / "checkpoints").iterdir()] == ["step-4"]
    assert result(run()) == result(wholes())


def test_too_little_space_is_refused_before_training(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "update", lambda *a: pytest.fail("it trained"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    refused(run, IO, "0.00 GiB free; a run needs", "three checkpoints")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["config.json", "lock"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, command):
    (tmp_path / "file").touch()
    process = start(command(folder=tmp_path / "file" / "r"))
    assert process.wait() == IO
    one_line(process, "cannot make the run folder", "Not a directory")


# Damaged and foreign checkpoints


def test_a_flipped_bit_costs_one_checkpoint(run, wholes):
    folder = run(stop=6).path
    run(stop=9)
    victim = folder / "checkpoints/step-9/model.safetensors"
    before = tensor_hash(load_file(victim))
    flip(victim)
    assert tensor_hash(load_file(victim)) != before, "safetensors alone loads it without a word"
    stopped = run(stop=10)
    assert events(stopped, "resume")[-2:] == [
        "checkpoint checkpoints/step-9/model.safetensors is damaged: its SHA-256 is not the manifest's", "continued from step 8"]
    assert [p.name for p in checkpoints(folder)] == ["step-10", "step-8"], "the damaged one makes no place for itself"
    assert result(run()) == result(wholes())


def test_a_damaged_checkpoint_is_made_again(run, wholes):
    folder = run(stop=8).path
    flip(folder / "checkpoints/step-8/optimizer.safetensors", 3000)
    stopped = run(stop=8)
    assert read_checkpoint(folder / "checkpoints/step-8").step == 8 and "continued from step 4" in events(stopped, "resume")
    assert result(run()) == result(wholes())


def test_without_hashes_a_flipped_bit_changes_the_run(run, wholes, monkeypatch):
    "The negative control."
    victim = run(stop=6).path / "checkpoints/step-6/model.safetensors"
    flip(victim, -2, 4)
    believed = {name: entry["sha256"] for name, entry in json.loads((victim.parent / "manifest.json").read_text())["files"].items()}
    monkeypatch.setattr(runs, "sha256_file", lambda path: believed.get(path.name))
    assert run().info["weights"]["final"] != wholes().info["weights"]["final"]


def test_every_flipped_bit_is_noticed(run):
    step = checkpoints(run(tiny(n_layer=1, d_model=8, n_head=1, d_ff=8, vocab_size=257, bpe_vocab=257), stop=1).path)[0]
    good = read_checkpoint(step)
    for path in sorted(step.iterdir()):
        size = path.stat().st_size
        for at in range(0, size, 5 if path.suffix == ".json" else size // 40):
            data = path.read_bytes()
            flip(path, at, at % 8)
            with pytest.raises(RunError) as caught:
                read_checkpoint(step)
            assert caught.value.exit_code == BAD_DATA and "\n" not in str(caught.value)
            path.write_bytes(data)
    assert {g: tensor_hash(t) for g, t in read_checkpoint(step).groups.items()} == {g: tensor_hash(t) for g, t in good.groups.items()}


def test_two_damaged_checkpoints_are_refused(run, tmp_path, command):
    folder = run(stop=6).path
    flip(folder / "checkpoints/step-6/model.safetensors")
    (folder / "checkpoints/step-4/manifest.json").write_text("{")
    before = tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")
    process = start(command())
    assert process.wait() == BAD_DATA
    one_line(process, f"no checkpoint of {folder} can be read; the newest: checkpoint {folder}/checkpoints/step-6/model.safetensors is damaged")
    assert (tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")) == before


def test_other_configuration_other_data(run, tmp_path):
    folder = run(stop=3).path
    refused(lambda: run(tiny(lr=0.02)), USAGE, "is of another configuration: train.lr is 0.01 there and 0.02 here")
    other = run(tiny(seed=1), "other", stop=5).path
    shutil.copytree(other / "checkpoints/step-5", folder / "checkpoints/step-5")
    refused(run, BAD_DATA, "step-5 was made with another config_hash")

    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text(" ".join(f"{(n * 37 + i * i) % 101} apples" for i in range(300)))
    config = tiny(source=str(text), bpe_vocab=300)
    folder = run(config, "words", stop=3).path
    before = tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")
    (text / "7.txt").write_text("no apples " * 300)
    refused(lambda: run(config, "words"), BAD_DATA, "step-3 was made with another data")
    assert (tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")) == before


# Secrets


def leaks(folder: Path, words: list[str]) -> set[tuple[str, str]]:
    "Words in the names or bytes of a folder's files."
    files = {p.relative_to(folder): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
    return {(str(name), word) for name, data in files.items() for word in words if word.encode() in data + str(name).encode()}


def test_no_secret_and_no_path_reaches_the_folder(tmp_path, command):
    secrets = {"HF_TOKEN": "hf_FakeFakeFake", "AWS_SECRET_ACCESS_KEY": "wJalrFakeKey", "WANDB_API_KEY": "0123fakefake",
               "https_proxy": "http://user:passFake@proxy.example:3128"}
    folder = tmp_path / "r"
    words = [*secrets.values(), "passFake", *secrets, str(tmp_path), str(Path(__file__).parents[1]), sys.prefix, f"{Path.home()}/", os.uname().nodename]
    words = [w for w in words if len(w) > 5]
    assert start(command(), ("kill step", 9), **secrets).wait() == -signal.SIGKILL
    flip(checkpoints(folder)[0] / "model.safetensors")
    assert start(command(), ("nan gradient", 10), **secrets).wait() == NUMERIC
    assert start(command(), **secrets).wait() == 0
    assert len(events(load_run(folder), "resume")) == 3 and events(load_run(folder), "nonfinite")
    assert leaks(folder, words) == set()
    (folder / "leak.json").write_text(json.dumps({"env": secrets, "cwd": str(tmp_path)}))
    assert {word for _, word in leaks(folder, words)} >= {*secrets.values(), str(tmp_path)}, "the search finds what is there"
