"""Training in real processes that may die, at the price of a fork: one interpreter imports everything and forks.

Here are also the faults that such a process can be given: moments at which it kills itself, disks that fill, numbers
that spoil. Tests call `start`; the interpreter that forks is this file, run as a program. With a job as its argument it
runs that one, for torchrun to start.
"""

import atexit
import builtins
import errno
import fcntl
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import psutil
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hybrid_nb.config import errors
from hybrid_nb.config.config import Config, ModelConfig
from hybrid_nb.config.override import override
from hybrid_nb.config.presets import get_config
from hybrid_nb.data.grammar import grammar_entropy
from hybrid_nb.model.decoder import DecoderForCausalLM, make_decoder
from hybrid_nb.runs import files, runs
from hybrid_nb.train import __main__, checkpoint, distributed, loop, optim
from hybrid_nb.train.evaluate import sample_text

KILL_STEP = 8  # a step that ends in a checkpoint
TEMPORARY = f".tmp-step-{KILL_STEP}"


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name: str, when, before=None, after=None):
    "Let a function do something more before or after those calls whose arguments satisfy `when`."
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        hit = when(*args)
        if hit and before:
            before(*args)
        result = real(*args, **kwargs)
        if hit and after:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def halve_and_die(tensors, path, *args):
    os.truncate(path, path.stat().st_size // 2)
    die()


def gut_and_die(path, *args):
    next(Path(path).iterdir()).unlink()
    die()


def half_record_and_die(folder, kind, *args):
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 9, "lo')
    die()


def at_update(step: int, action, when: str = "before"):
    "Do something before, amid or after the update that follows `step` others; amid: its gradients are there."
    def amid(*args):
        wrap(torch.nn.utils, "clip_grad_norm_", lambda *a: True, before=lambda *a: action(*args))

    do = {"before": {"before": action}, "amid": {"before": amid}, "after": {"after": action}}[when]
    wrap(loop, "update", lambda *a: a[6] == step, **do)


def in_checkpoint(path: Path, *args) -> bool:
    return path.parent.name == TEMPORARY


KILLS = {
    "temporary directory": lambda: wrap(Path, "mkdir", lambda p, *a: p.name == TEMPORARY, after=die),
    "mid-write": lambda: wrap(safetensors.torch, "save_file",
                              lambda t, p, *a: in_checkpoint(p) and p.stem == "optimizer", after=halve_and_die),
    "before manifest": lambda: wrap(checkpoint, "write_file", in_checkpoint, before=die),
    "before rename": lambda: wrap(os, "rename", lambda a, b: Path(b).name == f"step-{KILL_STEP}", before=die),
    "after rename": lambda: wrap(os, "rename", lambda a, b: Path(b).name == f"step-{KILL_STEP}", after=die),
    "mid-rotation": lambda: wrap(shutil, "rmtree", lambda p, *a: ".tmp-old" in str(p), before=gut_and_die),
    "mid-step": lambda: at_update(KILL_STEP + 1, die, "amid"),
    "mid-record": lambda: wrap(loop, "append_record", lambda f, kind, step: (kind, step) == ("train", KILL_STEP + 1),
                               before=half_record_and_die),
    "finished model": lambda: wrap(DecoderForCausalLM, "save_pretrained", lambda *a: True, after=die),
    "before done": lambda: wrap(loop, "write_json", lambda p, v: v["status"] == "done", before=die),
}


def kill_step(step: str):
    "Die amid the update that follows `step` others."
    at_update(int(step), die, "amid")


def slow():
    wrap(loop, "update", lambda *a: True, before=lambda *a: time.sleep(0.15))


def fill_disk(folder: str, when: str, left: str = "0"):
    "Another program fills the disk, but for some KiB, before a checkpoint is made, a record or the finished model."
    def fill(*args):
        with open(Path(folder) / "filler", "wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                os.truncate(f.fileno(), max(0, f.tell() - 1024 * int(left)))

    {"checkpoint": lambda: at_update(KILL_STEP - 1, fill, "after"),
     "record": lambda: at_update(KILL_STEP + 1, fill, "after"),
     "model": lambda: wrap(DecoderForCausalLM, "save_pretrained", lambda *a: True, before=fill),
     "tokenizer": lambda: wrap(DecoderForCausalLM, "save_pretrained", lambda *a: True, after=fill)}[when]()


def nan_gradient(step: str, rank: str = "0"):
    "A gradient turns to NaN in the update that follows `step` others, on one rank."
    def plant(model, *args):
        if os.environ.get("RANK", "0") == rank:
            next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))

    at_update(int(step), plant)


def fail_with(kind: str, step: str, message: str = ""):
    "An error of some type comes before the update that follows `step` others."
    def fail(*args):
        raise getattr(builtins, kind)(message)

    at_update(int(step), fail)


def kill_workers(step: str):
    "The processes that prepare batches are killed before the update that follows `step` others."
    at_update(int(step), lambda *args: [p.kill() for p in psutil.Process().children()])


def no_flock():
    "A file system without `flock`."
    def flock(fd, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock


def no_home():
    "Neither HOME nor an entry among the users."
    def nobody(*args):
        raise KeyError("getpwuid(): uid not found")

    os.environ.pop("HOME", None)
    pwd.getpwuid = pwd.getpwnam = nobody


def unreadable(step: str, rank: str):
    "One rank cannot read the checkpoint of a step."
    def refuse(path):
        raise errors.RunError(f"checkpoint {path} cannot be read here", errors.BAD_DATA)

    wrap(checkpoint, "read_checkpoint", lambda path: path.name == f"step-{step}" and os.environ["RANK"] == rank, before=refuse)


def no_handlers():
    "The naive program: signals are nobody's business."
    signal.signal = lambda number, handler: signal.getsignal(number)


def same_batches():
    "The naive program: every rank sees what the first should see."
    real = loop.loader
    loop.loader = lambda data, t, start, stop, rank, size: real(data, t, start, stop, 0, size)


def uneven_batch() -> tuple[torch.Tensor, torch.Tensor]:  # each (2 micro-batches, 4 sequences, 8 tokens)
    "Tokens and targets: in its two sequences of each micro-batch the first rank has 0 and 3, the second 12 and 12."
    x, y = torch.randint(40, (2, 2, 4, 8), generator=torch.Generator().manual_seed(0))
    y[0, :2], y[1, 0], y[1, 1, 3:], y[:, 2, 4:] = -100, -100, -100, -100
    return x, y


UNEVEN = get_config("smoke", {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": 40, "grad_clip": 0.1})


def uneven_update(folder: str):
    "Instead of a run: one update over uneven targets on two ranks, its loss, norm and parameters written to files."
    def main(argv):
        world, _ = distributed.join_world("cpu")
        torch.manual_seed(0)
        model = make_decoder(UNEVEN.model)
        net = torch.nn.parallel.DistributedDataParallel(model)
        x, y = (t[:, 2 * world.rank:][:, :2] for t in uneven_batch())
        optimizer, off = optim.make_optimizer(model, UNEVEN.train), torch.amp.GradScaler("cpu", enabled=False)
        loss, norm, _ = optim.update(net, optimizer, off, x, y, UNEVEN.train, 0, world, nullcontext)
        parts = {n: p.detach() for n, p in model.named_parameters()}
        parts |= {"loss": torch.tensor(loss).double(), "norm": torch.tensor(norm).double()}
        safetensors.torch.save_file(parts, f"{folder}/rank-{world.rank}.safetensors")
        torch.distributed.barrier()

    __main__.main = main


DIVIDED = get_config("smoke", {
    "n_layer": 1, "d_model": 16, "n_head": 2, "n_kv_head": 2, "d_ff": 24, "vocab_size": 41, "ffn": "swiglu", "seq_len": 8, "batch_size": 4,
    "grad_accum": 1})


def one_update(mode: str, world: distributed.ProcessGroup, rank: int, what: str) -> str | None:  # None: there is no such weight
    "What an update ends in when one rank has NaN in the gradient of a kind of weight, or its loss is infinite."
    from hybrid_nb.experiments.parallel import trial_batch  # takes seconds to import
    from hybrid_nb.train.parallel import ParallelStrategy

    torch.manual_seed(0)
    model = make_decoder(DIVIDED.model)
    layout = ParallelStrategy(mode, DIVIDED, world, torch.device("cpu"))
    net, optimizer = layout.shard(model, DIVIDED.train)
    chosen = [p for p in model.parameters() if p.requires_grad and hasattr(p, "full_tensor") is (what == "sharded")]
    if not chosen and what in ("whole", "sharded"):
        return None
    real = optim.clip_gradients

    def spoil(params, most):
        if what in ("whole", "sharded") and world.rank == rank:
            grad = chosen[-1].grad
            (grad.to_local() if hasattr(grad, "full_tensor") else grad).fill_(float("nan"))
        return real(params, most)

    def inflate(module, args, kwargs, out):
        if what == "loss" and world.rank == rank:
            out["token_loss"] = out.loss.detach() * float("inf")
        return out

    model.register_forward_hook(inflate, with_kwargs=True)
    readers, off = layout.readers, torch.amp.GradScaler("cpu", enabled=False)
    share = DIVIDED.train.batch_size // readers.size
    x, y = (t[:, share * readers.rank :][:, :share] for t in trial_batch(DIVIDED, 0))
    optim.clip_gradients = spoil
    try:
        optim.update(net, optimizer, off, x, y, DIVIDED.train, 0, readers, nullcontext)
        return "went on"
    except FloatingPointError as error:
        return str(error)
    finally:
        optim.clip_gradients = real


def one_rank_sees(folder: str):
    "Instead of a run: updates in every layout with something wrong on one rank; what each rank makes of them, in files."
    from hybrid_nb.account import layout  # takes seconds to import

    def main(argv):
        world, _ = distributed.join_world("cpu")
        found = {f"{mode} {what} {rank}": one_update(mode, world, rank, what)
                 for mode in layout.MODES for what in ("whole", "sharded", "loss", "nothing") for rank in (0, 1)}
        real = distributed.ProcessGroup.reduce
        distributed.ProcessGroup.reduce = lambda self, t: t if self.copies > 1 else real(self, t)
        found["naive"] = one_update("tp2", world, 1, "whole")
        Path(f"{folder}/saw-{world.rank}.json").write_text(json.dumps(found))
        torch.distributed.barrier()

    __main__.main = main


FAULTS = {"kill": lambda point: KILLS[point](), "kill step": kill_step, "slow": slow, "fill disk": fill_disk,
          "nan gradient": nan_gradient, "no handlers": no_handlers, "same batches": same_batches,
          "uneven update": uneven_update, "fail with": fail_with, "kill workers": kill_workers, "no flock": no_flock,
          "no home": no_home, "unreadable": unreadable, "one rank sees": one_rank_sees}


# The interpreter that forks


def run(job: dict):
    for name, *args in job["faults"]:
        FAULTS[name](*args)
    __main__.main(job["argv"])


def child(job: dict):
    "A forked process: its own session, streams and environment, the faults, then the command."
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["env"])
    code = 1
    try:
        run(job)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, timeout: float) -> int | None:
    "The exit code of a child, negative where a signal ended it; None, and the child is killed, when time is up."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def warm_up():
    "Do once what every child would do again: imports on demand, the grammar's entropy."
    grammar_entropy()
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    sample_text(make_decoder(ModelConfig(n_layer=1, vocab_size=2), eos_token_id=1), tokenizer, "a", tokens=2)


def serve():
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            print(json.dumps(ended(**job)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)


# What tests call


RATES = {"HYBRID_NB_RATES": "fp32=1e9 bf16=1e9 fp16=1e9"}  # how fast this machine multiplies is what no test here is about
ENV = os.environ | RATES | {
    "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@cache
def interpreter() -> subprocess.Popen:
    "The interpreter that forks, started once in a session."
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, __file__], env=ENV, text=True, **pipes)
    atexit.register(process.communicate)
    assert process.stdout.readline() == "ready\n"
    return process


@cache
def streams() -> tempfile.TemporaryDirectory:
    "Where processes write what they say."
    return tempfile.TemporaryDirectory()


def ask(job: dict):
    server = interpreter()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@dataclass
class Process:
    "A training process that `start` started."
    pid: int
    out_path: str
    err_path: str

    def wait(self, timeout: float = 60) -> int:
        "Its exit code, negative where a signal ended it."
        code = ask({"pid": self.pid, "timeout": timeout})
        assert code is not None, f"still running after {timeout} s; {self.err}"
        return code

    @property
    def out(self) -> str:
        return Path(self.out_path).read_text()

    @property
    def err(self) -> str:
        return Path(self.err_path).read_text()


def job(argv: list, *faults: tuple) -> dict:
    return {"argv": [str(a) for a in argv], "faults": [[str(a) for a in f] for f in faults]}


def start(argv: list, *faults: tuple, **env: str) -> Process:
    "Run `python -m hybrid_nb.train` with arguments, faults and more environment in a process of its own."
    folder = tempfile.mkdtemp(dir=streams().name)
    out, err = f"{folder}/out", f"{folder}/err"
    return Process(ask(job(argv, *faults) | {"env": env, "out": out, "err": err}), out, err)


# What a run came to

TINY = {
    "n_layer": 2, "d_model": 32, "n_head": 2, "d_ff": 64, "vocab_size": 400, "max_seq_len": 32, "dropout": 0.1,
    "attn_dropout": 0.1, "seq_len": 32, "batch_size": 16, "grad_accum": 2, "steps": 16, "warmup_steps": 4, "lr": 0.01,
    "grad_clip": 0.2, "log_interval": 3, "eval_interval": 5, "eval_batches": 2, "save_interval": 4, "precision": "fp32",
    "compile": "no", "bpe_vocab": 400, "grammar_stories": 30, "valid_fraction": 0.2}
TIMES = {"tokens_per_s", "memory_gib", "elapsed_s", "busy_s", "busy_tokens"}


def tiny(**changes) -> Config:
    "A run of 16 steps and a second; an epoch ends inside the thirteenth step."
    return get_config("smoke", TINY | changes)


def tiny_hybrid(**changes) -> Config:
    "The same text and schedule for a hybrid model, with every loss and dropout that it has."
    base = tiny()
    shape = {"n_layer": 2, "d_model": 32, "n_head": 2, "d_state": 4, "window": 8, "gate_rank": 4, "dropout": 0.1,
             "branch_dropout": 0.3, "gate_balance": 1.0, "gate_entropy": 0.1, "vocab_size": base.model.vocab_size,
             "max_seq_len": base.model.max_seq_len, "seq_len": base.train.seq_len}
    hybrid = replace(get_config("hybrid-smoke", shape), train=base.train, data=base.data)
    return override(hybrid, changes)


@contextmanager
def one_thread():
    "In this process, too, one thread: results are compared with those of the same number of threads."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ, RATES):
        yield
    torch.set_num_threads(threads)


def untimed(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in TIMES}


def result(run: runs.Run) -> dict:
    "All that a run came to but its timings."
    last = checkpoint.read_checkpoint(checkpoint.checkpoints(run.path)[0])
    return {
        "status": run.info["status"], "weights": run.info["weights"], "data": run.info["data_hash"],
        "tokens": run.info["tokens_seen"], "groups": {g: checkpoint.tensor_hash(t) for g, t in last.groups.items()},
        "progress": untimed(last.state["progress"]), "scaler": last.state["scaler"],
        "records": [untimed(r) for r in run.records() if r["kind"] != "event"],
        "model": files.sha256_file(run.path / "model/model.safetensors")}


def events(run: runs.Run, name: str) -> list[str]:
    "What a run noted under an event's name."
    return [r["detail"] for r in run.records("event") if r["event"] == name]


def tree(folder: Path) -> dict:
    "Every file of a folder with its content and time."
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [folder, *folder.rglob("*")]}


def wait_for(what, seconds: float = 60):
    "Wait until a function is true."
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)


def trained(folder: Path, step: int) -> bool:
    "Whether a run has logged a step."
    return any(r["kind"] == "train" and r["step"] >= step for r in runs.read_records(folder))


if __name__ == "__main__":
    run(json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve()
