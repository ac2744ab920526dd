"""The promises of a run, tried for real: resuming bit for bit, kills, signals, NaN, full disks, flipped bits, secrets.

Run with `pytest tests/test_faults.py`. A process that is to die is a real one; each fault is also played to a naive
program, which must fail it.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from driver import ENV, KILLS, Process, events, one_thread, result, start, tiny, tiny_hybrid, trained, tree, wait_for
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hybrid_nb.cli.sample import sample_run
from hybrid_nb.config import errors
from hybrid_nb.config.config import Config, to_yaml
from hybrid_nb.config.errors import RunError
from hybrid_nb.data import batches
from hybrid_nb.data.batches import batch_hash
from hybrid_nb.data.prepare import prepare
from hybrid_nb.model.decoder import make_decoder
from hybrid_nb.runs import files, runs
from hybrid_nb.runs.runs import Run, load_run
from hybrid_nb.train import checkpoint, launch, loop
from hybrid_nb.train.checkpoint import checkpoints, latest_checkpoint, read_checkpoint, tensor_hash

BASE = tiny()
N = BASE.train.steps


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    "Where the text of these tests is prepared once."
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def run(tmp_path, cache):
    "A function that trains in this process: `run(config, name, stop=k)` is asked by SIGTERM to stop after step k."
    def begin(config: Config = BASE, name: str = "r", stop: int | None = None) -> Run:
        real = loop.update

        def update(*args):
            result = real(*args)
            if stop == args[6] + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "update", update)
            return launch.train(config, tmp_path / name, device="cpu", cache=cache)

    return begin


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, cache):
    "Uninterrupted runs, each made once: `wholes(config)`."
    made, folder = {}, tmp_path_factory.mktemp("whole")

    def whole(config: Config = BASE) -> Run:
        if config not in made:
            made[config] = launch.train(config, folder / f"r{len(made)}", device="cpu", cache=cache)
        return made[config]

    return whole


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


STOPS = [(1,), (6,), ("last",), ("next",), (N - 1,), (6, "next"), (1, "last", N - 1)]


@pytest.mark.parametrize("stops", STOPS, ids=str)
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


@pytest.mark.parametrize("changes", [{}, {"srte_share_across_layers": False, "precision": "bf16"},
                                     {"srte_encoding": "sincos", "tie_embeddings": False, "gradient_checkpointing": True}], ids=str)
def test_resuming_a_hybrid_model(run, wholes, changes):
    config = tiny_hybrid(**changes)
    run(config, stop=5)
    run(config, stop=13)
    again, whole = run(config), wholes(config)
    assert result(again) == result(whole)
    assert [r["mean"] for r in again.records("gates")] == [r["mean"] for r in whole.records("gates")]


def test_saving_does_not_change_the_run(wholes):
    always, never = result(wholes(tiny(save_interval=1))), result(wholes(tiny(save_interval=N)))
    assert always == never == result(wholes())


def fresh_optimizer(patch):
    real = checkpoint.load_training_state_dict
    patch.setattr(loop, "load_training_state_dict", lambda groups, model, opt: (real(groups, model, opt), opt.state.clear()))


def first_batch_again(patch):
    real = batches.loader
    patch.setattr(loop, "loader", lambda data, t, start, stop, *rest: real(data, t, 0, stop - start, *rest))


def forgotten_log(patch):
    real, empty = checkpoint.Progress, {"loss_sum": 0.0, "loss_count": 0}
    patch.setattr(checkpoint, "Progress", lambda **state: real(**(state | empty if state else {})))


NAIVE = {fresh_optimizer: {"weights", "groups", "records", "model"}, first_batch_again: {"weights", "data", "records"},
         forgotten_log: {"records"}}


@pytest.mark.parametrize("naive", NAIVE)
def test_naive_resuming_ends_elsewhere(run, wholes, monkeypatch, naive):
    run(stop=7)
    naive(monkeypatch)
    other, whole = result(run()), result(wholes())
    assert other["tokens"] == whole["tokens"]
    assert {key for key in whole if other[key] != whole[key]} >= NAIVE[naive]


# Processes that die


@pytest.fixture
def command(tmp_path, cache):
    "The arguments of `python -m hybrid_nb.train` for a configuration and a run folder."
    def arguments(config: Config = BASE, folder: Path | None = None) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config))
        return ["--config", str(path), "--run", str(folder or tmp_path / "r"), "--cache", str(cache), "--device", "cpu"]

    return arguments


def real_process(argv: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "hybrid_nb.train", *argv], env=ENV, text=True, **pipes)


def one_line(process: Process, *parts: str):
    "What went wrong is told in one line of stderr."
    assert len(process.err.splitlines()) == 1, process.err
    for part in parts:
        assert part in process.err


LEFT = {  # the newest checkpoint and the temporary folders that a kill leaves
    "temporary directory": (4, {".tmp-step-8"}), "mid-write": (4, {".tmp-step-8"}),
    "before manifest": (4, {".tmp-step-8"}), "before rename": (4, {".tmp-step-8"}), "after rename": (8, set()),
    "mid-rotation": (8, {".tmp-old-step-4"}), "mid-step": (8, set()), "mid-record": (8, set()),
    "finished model": (16, set()), "before done": (16, set())}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_run_again(tmp_path, command, wholes, point):
    folder, argv = tmp_path / "r", command(tiny(keep_checkpoints=1))
    assert start(argv, ("kill", point)).wait() == -signal.SIGKILL
    step, temporary = LEFT[point]
    assert load_run(folder).info["status"] == "interrupted"
    assert checkpoints(folder)[0].name == f"step-{step}"
    assert {p.name for p in (folder / "checkpoints").glob(".tmp-*")} == temporary
    again = start(argv)
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


def test_signals_stop_and_the_same_command_continues(tmp_path, command, wholes):
    "One folder's life: SIGTERM, a rival, SIGINT, the end, and once more; the real command first and last."
    folder, config = tmp_path / "r", tiny()
    process = real_process(command(config))
    wait_for((folder / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (errors.STOPPED, "")
    assert out.startswith("step ") and out.endswith(f"\nstopped: {folder}\n")
    stopped = load_run(folder)
    assert (stopped.info["status"], events(stopped, "stop")) == ("stopped", ["SIGTERM asked to stop"])
    step = read_checkpoint(checkpoints(folder)[0]).step
    assert 1 <= step < N - 6 and stopped.info["error"] == f"stopped at step {step} of {N}; the same command continues"

    process = start(command(config), ("slow",))
    wait_for(lambda: trained(folder, step + 1))
    rival = start(command(config))
    assert rival.wait() == errors.USAGE
    one_line(rival, f"run folder {folder} is in use by process {process.pid}")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == errors.STOPPED
    assert step < read_checkpoint(checkpoints(folder)[0]).step < N
    assert events(load_run(folder), "stop")[1:] == ["SIGINT asked to stop"]

    process = real_process(command(config))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and out.endswith(f"\ndone: {folder}\n")
    assert result(load_run(folder)) == result(wholes())
    before = tree(folder)
    again = start(command(config))
    assert again.wait() == 0 and again.out == f"{folder.name} is finished: nothing to do\n"
    assert tree(folder) == before


def test_signals_to_the_whole_group_and_twice(tmp_path, command, wholes):
    "A scheduler's SIGTERM reaches the processes that prepare batches too, and by way of torchrun comes again."
    config = tiny(workers=1)
    process = start(command(config), ("slow",))
    wait_for(lambda: trained(tmp_path / "r", 3))
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.03)  # signals of one kind that wait together are one
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == errors.STOPPED, process.err
    assert start(command(config)).wait() == 0
    assert result(load_run(tmp_path / "r")) == result(wholes())


def test_without_handlers_a_signal_loses_the_steps(tmp_path, command):
    "The negative control."
    process = start(command(), ("no handlers",), ("slow",))
    wait_for(lambda: trained(tmp_path / "r", 3))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert len(checkpoints(tmp_path / "r")) <= 1 and load_run(tmp_path / "r").info["status"] == "interrupted"


# Numbers that are none


def spoil_loss(model, monkeypatch):
    real = model.forward

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        out.loss = out.token_loss = out.loss * float("inf")
        return out

    monkeypatch.setattr(model, "forward", forward)


def spoil_gradient(model, monkeypatch):
    next(model.parameters()).register_hook(lambda g: g * float("nan"))


@contextmanager
def spoiled(spoil, step: int):
    "Something wrong with the update that follows `step` others."
    real = loop.update
    with pytest.MonkeyPatch.context() as patch:
        def update(model, *args):
            if args[5] == step:
                spoil(model, patch)
            return real(model, *args)

        patch.setattr(loop, "update", update)
        yield


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_number_that_is_none_stops_before_the_update(run, wholes, spoil, cache, tmp_path):
    config = tiny()
    with spoiled(spoil, 6):
        what = {spoil_loss: "loss inf", spoil_gradient: "gradient norm nan"}[spoil]
        message = refused(lambda: run(config, "spoiled"), errors.NUMERIC, what, "step 7", "parameters of step 6 are kept")
    data = prepare(config.data, config.model.vocab_size, config.train.seq_len, cache)
    assert batch_hash(*data.batch(6, config.train))[:16] in message
    there = load_run(tmp_path / "spoiled")
    assert there.info["status"] == "failed" and message == f"spoiled: {there.info['error']}"
    assert events(there, "nonfinite") == [there.info["error"]]
    kept, good = read_checkpoint(checkpoints(there.path)[0]), run(config, "good", stop=6)
    expected = read_checkpoint(good.path / "checkpoints/step-6")
    assert kept.step == 6
    for group in ("model", "optimizer"):
        assert tensor_hash(kept.groups[group]) == tensor_hash(expected.groups[group])
    assert result(run(config, "spoiled")) == result(wholes())


def test_the_process_says_so_in_one_line(tmp_path, command, wholes):
    process = start(command(), ("nan gradient", 6))
    assert process.wait() == errors.NUMERIC
    one_line(process, "gradient norm nan at step 7, batch ")
    assert start(command()).wait() == 0
    assert result(load_run(tmp_path / "r")) == result(wholes())


def test_a_naive_update_spoils_every_parameter(run, monkeypatch):
    "The negative control: the same fault, without the check."
    monkeypatch.setattr(loop.math, "isfinite", lambda x: True)
    monkeypatch.setattr(loop, "sample_text", lambda *a, **k: "")
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
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled, **_: real(device, value, enabled=enabled))

    return begin


def untouched(run: Run) -> bool:
    "Whether the newest checkpoint holds the parameters that the run began with."
    torch.manual_seed(run.config.train.seed)
    begin = make_decoder(run.config.model).state_dict()
    return all(torch.equal(t, begin[name]) for name, t in latest_checkpoint(run.path)[0].groups["model"].items())


def test_overflow_is_skipped_and_counted(run, scale, monkeypatch):
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

    run(config, "naive", stop=2)  # the negative control: a scale that resuming forgets
    monkeypatch.setattr(torch.amp.grad_scaler.GradScaler, "load_state_dict", lambda self, state: None)
    assert run(config, "naive").info["weights"]["final"] != whole.info["weights"]["final"]


def test_twenty_overflows_in_a_row_stop(run, scale, tmp_path):
    scale(2.0**100)
    config = tiny(**HALF | {"steps": 24, "eval_interval": 24, "save_interval": 9})
    run(config, stop=10)
    message = refused(lambda: run(config), errors.NUMERIC, "fp16 overflowed 20 times in a row, last at step 20")
    stopped = load_run(tmp_path / "r")
    assert stopped.info["status"] == "failed" and message == f"r: {stopped.info['error']}"
    assert len(events(stopped, "overflow")) == 20
    kept = read_checkpoint(checkpoints(stopped.path)[0])
    assert kept.step == 20 and untouched(stopped)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    "A disk of its own, of 4 MiB, where this user may mount one."
    there = tmp_path / "disk"
    there.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", there]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield there
    subprocess.run(["umount", "-l", there], check=True)


FULL = {"checkpoint": (100, 4), "record": (0, 8), "model": (8, N), "tokenizer": (0, N)}  # KiB left; newest checkpoint


@pytest.mark.parametrize("file", FULL)
def test_full_disk(small_disk, command, wholes, file):
    "Another program fills the disk: one line, the last good checkpoint as it was, and room is all that is missing."
    folder = small_disk / "r"
    left, step = FULL[file]
    argv = command(folder=folder)
    full = start(argv, ("fill disk", small_disk, file, left))
    assert full.wait() == errors.IO, full.err
    one_line(full, str(folder), "No space left on device")
    good, skipped = latest_checkpoint(folder)
    assert (good.step, skipped) == (step, [])
    (small_disk / "filler").unlink()
    again = start(argv)
    assert again.wait() == 0, again.err
    assert result(load_run(folder)) == result(wholes())
    assert events(load_run(folder), "resume") == [f"continued from step {step}"]


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


NO_ROOM = [("safetensors.torch", "save_file", no_room_in_rust), ("hybrid_nb.train.checkpoint", "write_file", no_room),
           ("os", "rename", no_room)]


@pytest.mark.parametrize("owner, name, fault", NO_ROOM)
def test_full_disk_pretended(run, wholes, monkeypatch, owner, name, fault):
    "The same where nothing can be mounted: the second checkpoint meets a full disk."
    folder = run(stop=4).path / "checkpoints"
    before = tree(folder / "step-4")
    with monkeypatch.context() as patch:
        module = sys.modules[owner]
        real = getattr(module, name)
        patch.setattr(module, name, lambda *a, **k: (fault if "step-8" in "".join(map(str, a)) else real)(*a, **k))
        refused(run, errors.IO, "cannot save the checkpoint of step 8", "No space left on device")
    assert tree(folder / "step-4") == before and [p.name for p in folder.iterdir()] == ["step-4"]
    assert result(run()) == result(wholes())


def test_too_little_space_is_refused_before_training(run, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "update", lambda *a: pytest.fail("it trained"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    refused(run, errors.IO, "1,000 bytes free; a run needs 1.01 MiB (three checkpoints)")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["config.json", "lock"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, command):
    (tmp_path / "file").touch()
    process = start(command(folder=tmp_path / "file" / "r"))
    assert process.wait() == errors.IO
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
    skipped, continued = events(stopped, "resume")[-2:]
    assert skipped == "checkpoint checkpoints/step-9/model.safetensors is damaged: its SHA-256 is not the manifest's"
    assert continued == "continued from step 8"
    assert [p.name for p in checkpoints(folder)] == ["step-10", "step-8"], "the damaged one makes no place for itself"
    assert result(run()) == result(wholes())


def test_a_damaged_checkpoint_is_made_again(run, wholes):
    folder = run(stop=8).path
    flip(folder / "checkpoints/step-8/optimizer.safetensors", 3000)
    assert "continued from step 4" in events(run(stop=8), "resume")
    assert read_checkpoint(folder / "checkpoints/step-8").step == 8
    assert result(run()) == result(wholes())


def test_without_hashes_a_flipped_bit_changes_the_run(run, wholes, monkeypatch):
    "The negative control."
    victim = run(stop=6).path / "checkpoints/step-6/model.safetensors"
    flip(victim, -2, 4)
    files = json.loads((victim.parent / "manifest.json").read_text())["files"]
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: files[path.name]["sha256"] if path.name in files else "")
    assert run().info["weights"]["final"] != wholes().info["weights"]["final"]


def test_every_flipped_bit_is_noticed(run):
    small = {"n_layer": 1, "d_model": 8, "n_head": 1, "d_ff": 8, "vocab_size": 257, "bpe_vocab": 257}
    step = checkpoints(run(tiny(**small), stop=1).path)[0]
    for path in sorted(step.iterdir()):
        size = path.stat().st_size
        for at in range(0, size, 11 if path.suffix == ".json" else size // 40):
            flip(path, at, at % 8)
            refused(lambda: read_checkpoint(step), errors.BAD_DATA, str(step))
            flip(path, at, at % 8)
    assert read_checkpoint(step).step == 1


def test_two_damaged_checkpoints_are_refused(run, tmp_path, command):
    folder = run(stop=6).path
    flip(folder / "checkpoints/step-6/model.safetensors")
    (folder / "checkpoints/step-4/manifest.json").write_text("{")
    before = tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")
    process = start(command())
    assert process.wait() == errors.BAD_DATA
    one_line(process, f"no checkpoint of {folder} can be read", "checkpoints/step-6/model.safetensors is damaged")
    assert (tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")) == before


def test_other_configuration_other_data(run, tmp_path):
    folder = run(stop=3).path
    refused(lambda: run(tiny(lr=0.02)), errors.USAGE, "is of another configuration: train.lr is 0.01 there and 0.02 here")
    other = run(tiny(seed=1), "other", stop=5).path
    shutil.copytree(other / "checkpoints/step-5", folder / "checkpoints/step-5")
    refused(run, errors.BAD_DATA, "step-5 was made with another config_hash")

    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text(" ".join(f"{(n * 37 + i * i) % 101} apples" for i in range(300)))
    config = tiny(source=str(text), bpe_vocab=300)
    folder = run(config, "words", stop=3).path
    before = tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")
    (text / "7.txt").write_text("no apples " * 300)
    refused(lambda: run(config, "words"), errors.BAD_DATA, "step-3 was made with another data")
    assert (tree(folder / "checkpoints"), tree(folder / "metrics.jsonl")) == before


# Strangers' files


JUNK = [None, [], {}, "x", -1, True, 1.5, 10**30, float("nan"), "9" * 70]
PLAUSIBLE = {"elapsed_s", "loss_sum", "busy_s", "busy_tokens", "loss_count", "overflows"}  # any number may be right
IDENTITY = {"config_hash", "data", "frozen_sha256"}


def nodes(value, path=()):
    "The place of everything in nested JSON."
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(part, (*path, key))


def at(value, path: tuple):
    for key in path:
        value = value[key]
    return value


def replaced(value, path: tuple, new):
    "Nested JSON with another thing, or with nothing (`...`), in one place."
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def rehash(step: Path, manifest=..., groups: dict | None = None):
    "Write a checkpoint's files and its manifest anew, all hashes right."
    manifest = json.loads((step / "manifest.json").read_text()) if manifest is ... else manifest
    for name, tensors in (groups or {}).items():
        path = step / f"{name}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        manifest["files"][path.name] = {
            "sha256": files.sha256_file(path), "size": path.stat().st_size, "tensors": checkpoint.tensor_forms(tensors)}
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
        manifest = manifest | {"sha256": checkpoint._manifest_hash(manifest)}
    (step / "manifest.json").write_text(json.dumps(manifest))


def forge_tensors(step: Path, draw: random.Random):
    "Change one tensor of a checkpoint in some way, and hash it anew."
    groups = read_checkpoint(step).groups
    group = draw.choice(["model", "optimizer", "optimizer", "generators"])
    tensors = groups[group]
    name = draw.choice(sorted(tensors))
    t = tensors[name]
    others = [n for n in tensors if tensors[n].shape != t.shape]
    ways = {
        "drop": lambda: tensors.pop(name),
        "cut": lambda: tensors.update({name: t.reshape(-1)[:1] if t.numel() > 1 else torch.zeros(2)}),
        "reshape": lambda: tensors.update({name: t.reshape(1, *t.shape)}),
        "half": lambda: tensors.update({name: t.half()}),
        "double": lambda: tensors.update({name: t.double()}),
        "whole numbers": lambda: tensors.update({name: t.long()}),
        "rename": lambda: tensors.update({name + "x": tensors.pop(name)}),
        "add": lambda: tensors.update({"more": torch.zeros(3)}),
        "spoil": lambda: tensors.update({name: torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 255)}),
        "empty": lambda: tensors.clear(),
        "swap": lambda: tensors.update({name: tensors[others[0]], others[0]: t} if others else {name: t[None]}),
        "count": lambda: groups["optimizer"].update({n: t + 1 for n, t in groups["optimizer"].items() if n.endswith(".step")}),
        "negative": lambda: groups["optimizer"].update({n: t - 1 for n, t in groups["optimizer"].items() if n.endswith("exp_avg_sq")}),
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    rehash(step, groups=groups)
    return f"{way} {group}.{name}"


def forge_manifest(step: Path, draw: random.Random):
    "Put junk, or nothing, somewhere into a manifest, and hash it anew; what may be right is left alone."
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["sha256"]
    places = [p for p in nodes(manifest) if not {*p} & (PLAUSIBLE | IDENTITY) and p != ("state", "scaler")]
    path = draw.choice([p for p in places if "tensors" not in p] if draw.random() < 0.7 else places)
    new = draw.choice([*JUNK, *([...] if path else [])])
    if path[-1:] in (("windows",), ("updates",)) and new is ... or path[-1:] == ("tokens",) and new is True or at(manifest, path) == new:
        new = None  # what follows from the rest may be missing, and True is a number to Python
    rehash(step, replaced(manifest, path, new))
    return f"{path} {new}"


SHORT = tiny(n_layer=1, d_model=16, n_head=2, d_ff=16, vocab_size=260, bpe_vocab=260, batch_size=4, grad_accum=1, steps=8, save_interval=3,
             eval_interval=8)


@pytest.fixture
def short(run, tmp_path):
    "A stopped run with checkpoints of steps 3 and 5, and copies of it: `short()`."
    source, made = run(SHORT, "source", stop=5).path, []

    def copy() -> Path:
        made.append(tmp_path / f"copy-{len(made)}")
        return Path(shutil.copytree(source, made[-1]))

    return copy


def checker(config: Config):
    "What a run asks of a checkpoint."
    model = make_decoder(config.model)
    off = torch.amp.GradScaler("cpu", enabled=False)
    batch = config.train.batch_size * config.train.grad_accum
    return lambda found: checkpoint.check_checkpoint(found, config.train, batch, off, {"": model})


@pytest.mark.parametrize("forge", [forge_tensors, forge_manifest])
def test_a_forged_checkpoint_is_passed_over(short, forge):
    "Whatever was changed, and however well it was hashed: before one tensor is used, it is found."
    folder, check = short(), checker(SHORT)
    step, kept = folder / "checkpoints/step-5", folder / "kept"
    shutil.copytree(step, kept)
    assert latest_checkpoint(folder, check)[0].step == 5
    for seed in range(120):
        what = forge(step, random.Random(seed))
        found, skipped = latest_checkpoint(folder, check)
        assert (found.step, len(skipped)) == (3, 1), f"seed {seed}: {what}"
        assert "\n" not in skipped[0] and str(step) in skipped[0] and len(skipped[0]) < 500
        shutil.rmtree(step)
        shutil.copytree(kept, step)


@pytest.mark.parametrize("forge, seed", [(forge_tensors, 1), (forge_tensors, 2), (forge_manifest, 3)])
def test_a_run_goes_on_from_the_checkpoint_before(short, run, wholes, forge, seed):
    folder = short()
    forge(folder / "checkpoints/step-5", random.Random(seed))
    again = run(SHORT, folder.name)
    assert result(again) == result(wholes(SHORT))
    assert events(again, "resume")[-1] == "continued from step 3"


def test_with_every_checkpoint_forged_a_run_is_refused(short, run):
    folder = short()
    for step in checkpoints(folder):
        forge_tensors(step, random.Random(5))
    refused(lambda: run(SHORT, folder.name), errors.BAD_DATA, f"no checkpoint of {folder} can be read", "step-5")


def test_hashes_alone_let_a_cut_tensor_through(short, monkeypatch):
    "The negative control: what crashed the process in the update's kernel."
    folder = short()
    groups = read_checkpoint(folder / "checkpoints/step-5").groups
    name = next(n for n in groups["optimizer"] if n.endswith("exp_avg_sq"))
    groups["optimizer"][name] = groups["optimizer"][name][:1]
    rehash(folder / "checkpoints/step-5", groups=groups)
    assert latest_checkpoint(folder)[0].step == 5
    assert latest_checkpoint(folder, checker(SHORT))[0].step == 3


def test_what_earlier_versions_wrote_is_continued(short, run, wholes):
    "Checkpoints that do not say how many windows were read, a run.json without the global batch, records without checks."
    folder = short()
    for step in checkpoints(folder):
        manifest = json.loads((step / "manifest.json").read_text())
        del manifest["state"]["progress"]["windows"], manifest["state"]["progress"]["updates"]
        rehash(step, manifest)
    info, metrics = json.loads((folder / "run.json").read_text()), folder / "metrics.jsonl"
    del info["global_batch"]
    (folder / "run.json").write_text(json.dumps(info))
    metrics.write_text("".join(json.dumps(r) + "\n" for r in runs.read_records(folder)))
    again = run(SHORT, folder.name)
    assert result(again) == result(wholes(SHORT)) and events(again, "resume") == ["continued from step 5"]


DAMAGES = {
    "cut": lambda data, draw: data[: draw.randrange(len(data))],
    "byte": lambda data, draw: data[: (i := draw.randrange(len(data)))] + bytes([draw.choice([0xFF, 0, 0x22, 0x7B])]) + data[i + 1 :],
    "junk": lambda data, draw: draw.choice([b"[]", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"null", b"", b"1" * 5000]),
}


def damage(path: Path, draw: random.Random) -> str:
    "Damage a file of a run in some way."
    data = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.6:
        value = json.loads(data)
        where, new = draw.choice([p for p in nodes(value) if p]), draw.choice([*JUNK, ...])
        path.write_text(json.dumps(replaced(value, where, new)))
        return f"{path.name} {where} {new}"
    way = draw.choice(sorted(DAMAGES))
    path.write_bytes(DAMAGES[way](data, draw))
    return f"{path.name} {way}"


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl"])
def test_damaged_files_of_a_run_are_named(short, run, name):
    "One line with the file's name and exit code 65, or a run that goes on; with another configuration in it, 64."
    folder, ends = short(), []
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    for seed in range(25):
        what = damage(folder / name, random.Random(seed))
        try:
            load_run(folder).records()
            run(SHORT, folder.name, stop=6)
            ends.append("went on")
        except RunError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, what
            assert error.exit_code == errors.BAD_DATA or "of another configuration" in str(error), f"{what}: {error}"
            assert name in str(error) or "is of another configuration" in str(error) or "no checkpoint of" in str(error), f"{what}: {error}"
            ends.append("refused")
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert ends.count("refused") > 8


LINKS = ["lock", "metrics.jsonl", "run.json", "config.json", "checkpoints", "checkpoints/step-5", "checkpoints/step-5/manifest.json",
         "checkpoints/step-5/model.safetensors", "model", ".tmp-model", "checkpoints/.tmp-step-6", f".tmp-run.json-{os.getpid()}",
         f".tmp-metrics.jsonl-{os.getpid()}"]


@pytest.mark.parametrize("name", LINKS)
def test_no_link_is_followed(short, run, wholes, tmp_path, name):
    "What a link leads to stays as it is, and the run is refused in a line or ends as it should."
    folder, victim = short(), tmp_path / "victim"
    path = folder / name
    if path.exists():
        path.rename(victim)
    else:
        victim.mkdir() if "step" in name or "model" in name else victim.touch()
    (victim / "precious" if victim.is_dir() else victim).open("a").write("")
    path.symlink_to(victim)
    before = tree(victim)
    try:
        again = run(SHORT, folder.name)
        assert result(again) == result(wholes(SHORT)) and not path.is_symlink()
    except RunError as error:
        assert error.exit_code == errors.BAD_DATA and "is a link" in str(error)
        assert name in ("lock", "metrics.jsonl", "run.json", "config.json", "checkpoints")
    assert tree(victim) == before


# Machines unlike this one


def test_without_flock_a_marker_locks(tmp_path, command, wholes):
    "A second process is refused, and a marker whose process was killed is taken over."
    process = start(command(), ("no flock",), ("slow",))
    wait_for(lambda: trained(tmp_path / "r", 3))
    rival = start(command(), ("no flock",))
    assert rival.wait() == errors.USAGE
    one_line(rival, f"is in use by process {process.pid}")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = start(command(), ("no flock",), ("no home",))
    assert again.wait() == 0, again.err
    assert again.err == "" and result(load_run(tmp_path / "r")) == result(wholes())


# One line, whatever it was


ERRORS = {"MemoryError": (errors.IO, "out of memory"), "KeyError": (1, "KeyError: 'hf_FakeFakeFake'"),
          "RecursionError": (errors.BAD_DATA, ""), "OverflowError": (errors.NUMERIC, ""), "UnicodeError": (errors.BAD_DATA, ""),
          "KeyboardInterrupt": (errors.STOPPED, "interrupted"), "PermissionError": (errors.IO, ""), "AssertionError": (1, "")}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_one_line(tmp_path, command, kind):
    code, part = ERRORS[kind]
    process = start(command(SHORT), ("fail with", kind, 2, "hf_FakeFakeFake"), HF_TOKEN="hf_FakeFakeFake")
    assert process.wait() == code, process.err
    one_line(process, part.replace("hf_FakeFakeFake", "[redacted]") if kind == "KeyError" else part)
    logs = list((tmp_path / "r").glob("error-*.log"))
    if kind in ("MemoryError", "KeyboardInterrupt", "PermissionError"):
        assert logs == []
    else:
        assert str(logs[0]) in process.err
        assert logs[0].read_text().startswith("Traceback") and "hf_FakeFakeFake" not in logs[0].read_text() + process.err
    assert start(command(SHORT)).wait() == 0


def test_a_killed_worker_is_one_line(tmp_path, command):
    config = tiny(workers=1)
    process = start(command(config), ("kill workers", 5))
    assert process.wait() == errors.STOPPED
    one_line(process, "a process that reads batches was ended (DataLoader worker", "the same command continues")
    assert load_run(tmp_path / "r").info["status"] == "interrupted"
    assert start(command(config)).wait() == 0


def test_a_reader_that_goes_ends_no_run(tmp_path, command):
    "As with `| head -1`."
    process = real_process(command(SHORT))
    assert process.stdout.readline().startswith("step ")
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert load_run(tmp_path / "r").info["status"] == "done"


def test_hnb_too_keeps_the_traceback_of_an_unforeseen_error(tmp_path):
    code = "from hybrid_nb.cli import main; main.app = lambda *a, **k: {}['hf_FakeFakeFake']; main.main()"
    env = ENV | {"HF_TOKEN": "hf_FakeFakeFake", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    (log,) = tmp_path.glob("error-*.log")
    assert (done.returncode, done.stderr) == (1, f"hnb: KeyError: '[redacted]' (unforeseen; the traceback is in {log})\n")
    assert log.read_text().startswith("Traceback") and "hf_FakeFakeFake" not in log.read_text()


def test_a_sample_comes_from_a_checkpoint_of_this_model(short):
    folder = short()
    groups = read_checkpoint(folder / "checkpoints/step-5").groups
    groups["model"]["model.norm.weight"] = groups["model"]["model.norm.weight"][:1]  # which copying would spread over all channels
    rehash(folder / "checkpoints/step-5", groups=groups)
    told = sample_run(folder, prompt="a", tokens=5)
    shutil.rmtree(folder / "checkpoints/step-5")
    assert sample_run(folder, prompt="a", tokens=5) == told


def test_a_misspelt_option_is_one_line(command):
    process = start([*command(SHORT), "--paralel", "zero3"])
    assert process.wait() == errors.USAGE
    assert process.err == "RunError: unrecognized arguments: --paralel zero3\n"


# Secrets


def leaks(folder: Path, words: list[str]) -> set[str]:
    "Which words are in the names or bytes of a folder's files."
    files = list(folder.rglob("*"))
    names = "\n".join(str(p.relative_to(folder)) for p in files).encode()
    text = b"\n".join([names, *(p.read_bytes() for p in files if p.is_file())])
    return {word for word in words if word.encode() in text}


def test_no_secret_and_no_path_reaches_the_folder(tmp_path, command):
    folder, root = tmp_path / "r", Path(__file__).parents[1]
    secrets = {"HF_TOKEN": "hf_FakeFakeFake", "AWS_SECRET_ACCESS_KEY": "wJalrFakeKey", "WANDB_API_KEY": "0123fakefake",
               "https_proxy": "http://user:passFake@proxy.example:3128"}
    words = [*secrets, *secrets.values(), "passFake", str(tmp_path), str(root), sys.prefix, f"{Path.home()}/"]
    assert start(command(), ("kill step", 9), **secrets).wait() == -signal.SIGKILL
    flip(checkpoints(folder)[0] / "model.safetensors")
    assert start(command(), ("nan gradient", 10), **secrets).wait() == errors.NUMERIC
    assert start(command(), **secrets).wait() == 0
    assert len(events(load_run(folder), "resume")) == 3 and events(load_run(folder), "nonfinite")
    assert leaks(folder, words) == set()
    (folder / "leak.json").write_text(json.dumps({"env": secrets, "cwd": str(tmp_path)}))
    assert leaks(folder, words) >= {*secrets.values(), str(tmp_path)}, "the search finds what is there"
