"""Data across processes: two writers at once, a writer that is killed, a full disk, memory, a fresh interpreter."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid_nb.config import DataConfig, TrainConfig
from hybrid_nb.data import DataError, batch_hash, generate, load_tokens, prepare, story

SMALL = DataConfig(grammar_stories=300, bpe_vocab=400)
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
from hybrid_nb import data
from hybrid_nb.config import DataConfig, TrainConfig
SMALL = DataConfig(grammar_stories=300, bpe_vocab=400)
"""


def start(code: str, *args, **env) -> subprocess.Popen:
    "A Python process that runs the code with sys.argv[1:] = args."
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", HEAD + code, *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> str:
    "The fingerprint of undisturbed preparation."
    return prepare(SMALL, 400, 64, tmp_path_factory.mktemp("clean")).fingerprint


def test_two_processes_prepare_at_once(tmp_path, clean):
    code = """
write, cache = data._write_tokens, Path(sys.argv[1])
def slow(*args):
    time.sleep(1.5)
    print("wrote")
    return write(*args)
data._write_tokens = slow
(cache / f"ready-{os.getpid()}").touch()
while len(list(cache.glob("ready-*"))) < 2: time.sleep(.01)
print(data.prepare(SMALL, 400, 64, cache / "cache", verify=True).fingerprint)
"""
    lines = [finish(p).split() for p in [start(code, tmp_path) for _ in range(2)]]
    assert sorted(map(len, lines)) == [1, 2], "one process writes, the other waits"
    assert {words[-1] for words in lines} == {clean}
    assert not list((tmp_path / "cache").glob(".tmp-*"))


KILL = {
    "amid the tokens": """
write = data.ShardWriter.write
def fatal(self, tokens):
    write(self, tokens)
    self.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
data.ShardWriter.write = fatal
""",
    "before the manifest": """
dump = json.dumps
def fatal(value, **kind):
    if kind and "fingerprint" in value: os.kill(os.getpid(), signal.SIGKILL)
    return dump(value, **kind)
json.dumps = fatal
""",
    "before the rename": """
rename = os.rename
os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if "tokens" in str(b) else rename(a, b)
""",
}


@pytest.mark.parametrize("when", KILL)
def test_killed_writer_leaves_no_data(tmp_path, clean, when):
    killed = start(KILL[when] + "data.prepare(SMALL, 400, 64, sys.argv[1])", tmp_path)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".tmp-tokens-*")), "it was killed while it wrote"
    assert not list(tmp_path.glob("tokens-*"))
    assert prepare(SMALL, 400, 64, tmp_path, verify=True).fingerprint == clean
    assert not list(tmp_path.glob(".tmp-*"))


def test_writing_in_place_would_be_mistaken_for_data(tmp_path):
    "The negative control: killed midway, a writer without temporary names leaves a file that loads."
    killed = start("""
with open(sys.argv[1], "wb") as file:
    for n in range(1000):
        file.write(bytes(100)); file.flush()
        if n == 500: os.kill(os.getpid(), signal.SIGKILL)
""", tmp_path / "train.bin")
    killed.communicate(timeout=60)
    assert 0 < len(np.memmap(tmp_path / "train.bin", "<u2", "r")) < 50_000
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"train.bin": {"bytes": 100_000, "sha256": ""}}}))
    with pytest.raises(DataError, match="manifest.json is damaged"):
        load_tokens(tmp_path)


def test_full_disk_leaves_nothing(tmp_path):
    "A limit on file size stands in for a disk that is full."
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: data.prepare(SMALL, 400, 64, sys.argv[1])
except OSError as error: print(type(error).__name__, error.errno)
"""
    assert finish(start(code, tmp_path)).startswith("OSError")
    assert not list(tmp_path.glob("tokens-*")) and not list(tmp_path.glob(".tmp-tokens-*"))


def test_memory_does_not_grow_with_the_text(tmp_path):
    "The negative control holds the text and its tokens as a whole; ru_maxrss would begin at the peak of this process."
    text = "\n<|endoftext|>\n".join(s.text for s in generate(4000))
    bpe = prepare(DataConfig(grammar_stories=300, bpe_vocab=1000), 1000, 64, tmp_path / "bpe").folder
    prepared = "data.prepare(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]), 1000, 64, sys.argv[3])"
    whole = "[e.ids for e in data.load_tokenizer(sys.argv[2]).encode_batch(open(sys.argv[1]).read().split(data.END))]"
    grown = {}
    for way, copies in ((prepared, 1), (prepared, 4), (whole, 4)):
        (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([text] * copies))
        code = f"""
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = peak()
{way}
print(peak() - before)
"""
        grown[way, copies] = float(finish(start(code, tmp_path / "text.txt", bpe, tmp_path / "cache")))
    assert grown[prepared, 4] < grown[prepared, 1] + 40, f"MiB over the start: {grown}"
    assert grown[whole, 4] > grown[prepared, 1] + 100, f"MiB over the start: {grown}"


def test_a_fresh_interpreter_draws_the_same(tmp_path):
    config = TrainConfig(batch_size=2, grad_accum=2, seq_len=64, seed=3, workers=2)
    here = prepare(SMALL, 400, 64, tmp_path / "here")
    code = """
tokens = data.prepare(SMALL, 400, 64, sys.argv[1])
config = TrainConfig(batch_size=2, grad_accum=2, seq_len=64, seed=3, workers=1)
print(tokens.fingerprint, data.story(5).nats, *[data.batch_hash(*b) for b in data.loader(tokens, config, 100, 104)])
"""
    there = finish(start(code, tmp_path / "there", PYTHONHASHSEED="7")).split()
    hashes = [batch_hash(*here.batch(step, config)) for step in range(100, 104)]
    assert there == [here.fingerprint, str(story(5).nats), *hashes]
    assert len(pickle.dumps(here)) < 5000, "a worker opens the files instead of receiving their content"


def test_datasets_reads_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = {split: [s.text for s in generate(60, split=split)] for split in ("train", "valid")}
    for split, name in (("train", "train"), ("valid", "validation")):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps({"story": t}) + "\n" for t in texts[split]))
    data = DataConfig(source=f"hf:{tmp_path / 'set'}", text_key="story", bpe_vocab=400)
    tokens = prepare(data, 400, 64, tmp_path / "cache")
    assert (tokens.train_documents, tokens.valid_documents) == (60, 60)
    assert tokens.valid_bytes == sum(len(t.encode()) for t in texts["valid"])
    assert tokens.floor_nats is None and tokens.info()["source"] == data.source
