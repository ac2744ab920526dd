"""Data: two writers at once, a writer that is killed, a full disk, memory, a fresh interpreter; random texts against a count by hand."""

import gzip
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hybrid_nb.config.config import DataConfig, TrainConfig
from hybrid_nb.config.errors import DataError
from hybrid_nb.data.batches import batch_hash, loader
from hybrid_nb.data.grammar import generate, story
from hybrid_nb.data.prepare import load_tokens, prepare
from hybrid_nb.data.sources import END, corpus, scan, split_by_hash, text_documents
from hybrid_nb.data.tokenizer import encode, load_tokenizer, train_bpe

SMALL = DataConfig(grammar_stories=300, bpe_vocab=400)
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
from hybrid_nb.data import batches, grammar, prepare, sources, tokenizer, tokens
from hybrid_nb.config.config import DataConfig, TrainConfig
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
write, cache = prepare._write_tokens, Path(sys.argv[1])
def slow(*args):
    time.sleep(1.5)
    print("wrote")
    return write(*args)
prepare._write_tokens = slow
(cache / f"ready-{os.getpid()}").touch()
while len(list(cache.glob("ready-*"))) < 2: time.sleep(.01)
print(prepare.prepare(SMALL, 400, 64, cache / "cache", verify=True).fingerprint)
"""
    lines = [finish(p).split() for p in [start(code, tmp_path) for _ in range(2)]]
    assert sorted(map(len, lines)) == [1, 2], "one process writes, the other waits"
    assert {words[-1] for words in lines} == {clean}
    assert not list((tmp_path / "cache").glob(".tmp-*"))


KILL = {
    "amid the tokens": """
write = tokens.ShardWriter.write
def fatal(self, tokens):
    write(self, tokens)
    self.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
tokens.ShardWriter.write = fatal
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
    killed = start(KILL[when] + "prepare.prepare(SMALL, 400, 64, sys.argv[1])", tmp_path)
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
try: prepare.prepare(SMALL, 400, 64, sys.argv[1])
except OSError as error: print(type(error).__name__, error.errno)
"""
    assert finish(start(code, tmp_path)).startswith("OSError")
    assert not list(tmp_path.glob("tokens-*")) and not list(tmp_path.glob(".tmp-tokens-*"))


def test_memory_does_not_grow_with_the_text(tmp_path):
    "The negative control holds the text and its tokens as a whole; ru_maxrss would begin at the peak of this process."
    text = "\n<|endoftext|>\n".join(s.text for s in generate(4000))
    bpe = prepare(DataConfig(grammar_stories=300, bpe_vocab=1000), 1000, 64, tmp_path / "bpe").folder
    prepared = "prepare.prepare(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]), 1000, 64, sys.argv[3])"
    whole = "[e.ids for e in tokenizer.load_tokenizer(sys.argv[2]).encode_batch(open(sys.argv[1]).read().split(sources.END))]"
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
tokens = prepare.prepare(SMALL, 400, 64, sys.argv[1])
config = TrainConfig(batch_size=2, grad_accum=2, seq_len=64, seed=3, workers=1)
print(tokens.fingerprint, grammar.story(5).nats, *[batches.batch_hash(*b) for b in batches.loader(tokens, config, 100, 104)])
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


ODD = ("Ünïcode", "日本語", "\U0001f600", "a\u0301", "\u2028", "\ufeff", "\x07", "\t", "  ", "\\", '"', "word", "Once",
       "<s>", "</s>", "<|", "|>", "<|im_start|>")


def random_text(rng: random.Random, *more: str) -> str:
    "A text of odd words, that begins and ends with one of them and is no blank."
    words = rng.choices(ODD + more, k=rng.randrange(1, 30))
    return "x" + rng.choice(("", " ", "\n", "\n\n")).join(words) + "x"


def make_tokenizer(kind: str, folder: Path) -> str:
    "A folder with a tokenizer: of bytes, one whose template adds tokens, or one with special tokens that texts spell."
    tokenizer = train_bpe((s.text for s in generate(50)), 400)
    if kind != "bytes":
        tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    if kind == "template":
        ends = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def write_text(rng: random.Random, path: Path, texts: list[str]):
    "Texts as a .txt file, with end markers on lines of their own and within lines."
    ends = (f"\n{END}\n", END, f"\n{END}", f"{END}\n", f"\n  {END} \n")
    path.write_text("".join(t + rng.choice(ends) for t in texts).removesuffix("\n"), encoding=rng.choice(("utf-8", "utf-8-sig")))


def write_json(rng: random.Random, path: Path, texts: list[str]):
    "Texts as JSON lines, escaped or not, beside values that are read over."
    rows = [json.dumps({"n": int("9" * rng.choice((1, 10))), "text": t}, ensure_ascii=rng.random() < 0.5) for t in texts]
    whole = "".join(f"{row}\n" for row in rows).replace('"n": 9,', f'"n": {"9" * 5000},')
    path.write_text(whole, encoding=rng.choice(("utf-8", "utf-8-sig")))


@pytest.mark.parametrize("kind", ["bytes", "template", "special"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "TXT.gz", "Jsonl.GZ"])
def test_tokens_are_the_texts_with_one_end_after_each(tmp_path, kind, ending):
    "The reference joins the texts by hand; the negative control is the library's own call, which reads special tokens into a text."
    rng, is_json = random.Random(f"{kind} {ending}"), "jsonl" in ending.lower()
    (tmp_path / "data").mkdir()
    more = [END] if is_json else []
    texts = {name: [random_text(rng, *more) for _ in range(40)] for name in ("Train-0", "train-1", "a-Valid")}
    for name, some in texts.items():
        path = tmp_path / "data" / f"{name}.{ending}"
        (write_json if is_json else write_text)(rng, path, some)
        if ending.lower().endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "data" / f"._a.{ending}").write_bytes(b"\0\xff")
    source = DataConfig(source=str(tmp_path / "data"), tokenizer=make_tokenizer(kind, tmp_path / "tokenizer"))
    data = prepare(source, 500, 16, tmp_path / "cache")
    tokenizer = load_tokenizer(data.folder)
    expected = {"train": texts["Train-0"] + texts["train-1"], "valid": texts["a-Valid"]}
    for split, some in expected.items():
        tokens = getattr(data, split)[:]
        assert tokenizer.decode(tokens, skip_special_tokens=False) == "".join(t + END for t in some)
        assert list(tokens) == [i for t in some for i in (*encode(tokenizer, t), tokenizer.token_to_id(END))]
        assert sum(tokens == tokenizer.token_to_id(END)) == getattr(data, f"{split}_documents") == len(some)
    assert data.valid_bytes == sum(len(t.encode()) for t in texts["a-Valid"]) == data.spelled(0, data.valid_tokens)
    naive = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert kind == "bytes" and not is_json or [i for t in expected["valid"] for i in naive.encode(t).ids] != [
        i for t in expected["valid"] for i in encode(tokenizer, t)]


def test_markers_are_found_at_every_place(tmp_path):
    "Lines and blocks end anywhere within a marker; the reference splits the whole text."
    rng = random.Random(0)
    for n in range(300):
        texts = [random_text(rng, "<", "<|endof", "|endoftext|>", "\r") for _ in range(rng.randrange(1, 6))]
        write_text(rng, tmp_path / "a.txt", texts)
        whole = (tmp_path / "a.txt").read_text(encoding="utf-8-sig")
        longest = rng.choice((1, 7, 40, 1 << 20))
        found = [*text_documents(tmp_path / "a.txt", longest)]
        assert not any(END in text for text in found)
        ends = [part.strip("\n ") for part in whole.split(END)]
        if longest == 1 << 20:
            assert [text.strip("\n ") for text in found if text.strip()] == [part for part in ends if part.strip()], n
        else:
            assert "".join("".join(found).split()) == "".join("".join(ends).split()), n
        raw, size = (tmp_path / "a.txt").read_bytes(), rng.randrange(1, 40)
        with mock.patch("hybrid_nb.data.sources._chunks", return_value=[raw[i:i + size] for i in range(0, len(raw), size)]):
            facts, raw = scan(tmp_path / "a.txt"), b"\n" + raw + b"\n"
        places = [m for m in re.finditer(re.escape(END.encode()), raw)]
        lined = all(raw[m.start() - 1:m.start()] == b"\n" and re.match(rb"\r?\n", raw[m.end():]) for m in places)
        assert (facts.marked, facts.lined) == (bool(places), lined), n


HARM = {
    b'{"text": "cut emoji \\ud83d"}': "line 3: 'text' holds '\\ud83d', half of a character, at character 10",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "line 3 is not JSON: maximum recursion depth",
    b'{"text": ' + b"9" * 5000 + b"}": "line 3: 'text' holds a number, not text",
    b'{"text": null}': "line 3: 'text' holds NoneType, not text",
    b'{"text": "na\xefve"}': "line 3 is not UTF-8 text",
    b'{"text": "a"': "line 3 is not JSON",
    b'"text"': "line 3 has no key 'text'; its keys are: none",
    json.dumps({f"k{n}" * 99: 0 for n in range(9999)}).encode(): "line 3 has no key 'text'",
    b'{"t\\ud83d": 0}': "line 3 has no key 'text'; its keys are: t\\ud83d",
}


@pytest.mark.parametrize("n", range(len(HARM)))
def test_a_bad_row_is_one_line_with_its_place(tmp_path, n):
    line, message = [*HARM.items()][n]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good", "n": ' + b"9" * 5000 + b"}\n\n" + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError) as error:
        prepare(DataConfig(source=str(tmp_path / "a.jsonl")), 400, 16, tmp_path / "cache")
    said = str(error.value)
    said.encode()
    assert str(tmp_path / "a.jsonl") in said and message in said and len(said.splitlines()) == 1 and len(said) < 1500


def test_nothing_held_out_is_trained_on(tmp_path):
    "Folders of random names: by words that say so, a held-out file is for validation, or is not read, and that is said."
    held = "valid val validation dev eval evaluation test testing heldout held-out held_out holdout VALID Dev evalset".split()
    rng = random.Random(0)
    for n in range(60):
        folder = tmp_path / str(n)
        (folder / "more").mkdir(parents=True)
        names = {f"{rng.choice(('a', 'Tiny-V2', 'x.y', '00'))}{i}{sep}{word}{sep}{rng.choice('0b')}.{rng.choice(('txt', 'TXT'))}": word
                 for i in range(rng.randrange(2, 6)) for word in [rng.choice([*held, "train", "text"])] for sep in [rng.choice("-_.")]}
        for name in (*names, "more/b.txt", "._c.txt", "notes.md"):
            (folder / name).write_text("\n<|endoftext|>\n".join(f"{name} {i}" for i in range(9)))
        trainable = {name for name, word in names.items() if word not in held}
        source = DataConfig(source=str(folder))
        if not trainable:
            with pytest.raises(DataError, match="no text to train on"):
                corpus(source)
            continue
        found = corpus(source)
        read = {split: {d.text.split()[0] for d in found.documents() if d.split == split} for split in ("train", "valid")}
        assert read["train"] <= trainable
        files = dict(found.files)
        assert files.keys() | {name for name, _ in found.left} == {*names, "more/", "1 x .md"}
        assert all(split == "valid" for name, split in files.items() if name not in trainable)


def test_enough_is_held_out(tmp_path):
    "Of a few hundred stories, whatever share is asked for; a larger share holds out more of the same documents."
    rng = random.Random(0)
    for count in (200, 488):
        texts = [s.text for s in generate(count, rng.randrange(99))]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        for fraction in (0.0001, 0.01, 0.2):
            config = DataConfig(source=str(tmp_path / "a.jsonl"), bpe_vocab=300, valid_fraction=fraction)
            data = prepare(config, 300, 128, tmp_path / "cache")
            tokenizer, held = load_tokenizer(data.folder), {t for t in texts if split_by_hash(t, fraction) == "valid"}
            read = tokenizer.decode(data.valid[:], skip_special_tokens=False).split(END)[:-1]
            assert held <= {*read} and data.valid_documents >= 8 and data.valid_tokens >= 2048 and len(read) <= 0.3 * count
            assert data.train_documents + data.valid_documents == count


def test_bytes_of_what_is_evaluated(tmp_path):
    "The text that the targets spell, decoded by hand; with prompts, the answers alone. A share of the tokens would be wrong."
    rng = random.Random(0)
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        rows = [{"text": random_text(rng), "answer": random_text(rng) * (1 + i // 20)} for i in range(40)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key in ("", "answer"):
        config = DataConfig(source=str(tmp_path / "data"), answer_key=key, tokenizer=make_tokenizer("template", tmp_path / "t"))
        data, shares = prepare(config, 500, 16, tmp_path / "cache"), []
        tokenizer = load_tokenizer(data.folder)
        sizes = {i: len(token) for token, i in tokenizer.get_vocab().items() if i not in tokenizer.get_added_tokens_decoder()}
        for batch_size, seq_len, limit in ((1, 90, 1), (3, 40, 2), (2, 64, 5), (4, 32, 0)):
            ids = [i for _, y in data.valid_batches(batch_size, seq_len, limit) for i in y[y != -100].tolist()]
            found = data.evaluated_bytes(batch_size, seq_len, limit)
            assert found == sum(sizes.get(i, 0) for i in ids)
            shares.append(found / (data.valid_bytes * len(ids) / data.valid_targets))
        assert max(abs(share - 1) for share in shares) > 0.02


def test_shards_that_change_while_they_are_read(tmp_path):
    "With workers or without, the error is one line that names the file; the negative control is a mapped file, which kills."
    data = prepare(SMALL, 400, 64, tmp_path / "cache")
    path, config = data.train.paths[0], TrainConfig(batch_size=2, seq_len=64, steps=100)
    good = path.read_bytes()
    for workers in (0, 2):
        path.write_bytes(good)
        data = load_tokens(data.folder)
        batches = iter(loader(data, replace(config, workers=workers)))
        next(batches)
        os.truncate(path, 100)
        with pytest.raises(DataError) as error:
            list(batches)
        assert str(path) in str(error.value) and "cut, replaced or written to" in str(error.value) and "\n" not in str(error.value)
    mapped = "import os, sys, numpy; tokens = numpy.memmap(sys.argv[1], '<u2', 'r'); os.truncate(sys.argv[1], 0); print(tokens[:].sum())"
    assert subprocess.run([sys.executable, "-c", mapped, path], capture_output=True).returncode == -signal.SIGBUS


def test_a_tokenizer_that_cannot_tell_a_marker_from_text_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, END: 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a {END} a"}) + "\n")
    with pytest.raises(DataError, match="makes its end token of"):
        prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path)), 400, 4, tmp_path / "cache")


def test_a_worker_that_is_killed_ends_in_one_line_and_the_run_goes_on(tmp_path):
    "The kernel kills a worker for memory; PyTorch raises this wherever training stands."
    code = """
import logging, multiprocessing
sys.path.insert(0, sys.argv[2])
from driver import tiny
from hybrid_nb.config import errors
from hybrid_nb.train import launch
config = tiny(workers=1, steps=12, log_interval=1)
def kill(folder):
    for child in multiprocessing.active_children() if sys.argv[3] == "kill" else ():
        os.kill(child.pid, signal.SIGKILL)
        time.sleep(.5)
try: print(launch.train(config, sys.argv[1] + "/run", on_update=kill, cache=sys.argv[1] + "/cache").info["status"])
except errors.RunError as error: print(error.exit_code, error)
"""
    said = finish(start(code, tmp_path, Path(__file__).parent, "kill"))
    assert len(said.splitlines()) == 1 and said.startswith("75 run: a process that reads batches was ended (DataLoader worker"), said
    assert finish(start(code, tmp_path, Path(__file__).parent, "")).endswith("done\n")


def test_training_says_what_it_reads(tmp_path):
    (tmp_path / "text").mkdir()
    for name, count in (("train", 60), ("valid", 10), ("test", 1)):
        (tmp_path / "text" / f"{name}.txt").write_text("\n<|endoftext|>\n".join(s.text for s in generate(count)))
    code = """
sys.path.insert(0, sys.argv[2])
from driver import tiny
from hybrid_nb.config import errors
from hybrid_nb.train import launch
run = launch.train(tiny(source=sys.argv[1] + "/text", steps=2, eval_batches=0), sys.argv[1] + "/run", cache=sys.argv[1] + "/cache")
print(json.dumps([run.info["data"], run.records("eval")[-1], run.records("sample")[-1]]))
"""
    *table, last = finish(start(code, tmp_path, Path(__file__).parent)).splitlines()
    assert [line.split()[0] for line in table] == ["text", "training", "validation", "not"]
    assert "train.txt" in table[1] and "valid.txt" in table[2] and "test.txt: a test split" in table[3]
    info, found, sample = json.loads(last)
    assert (info["train_documents"], info["valid_documents"], len(info["reading"])) == (60, 10, 3)
    data = load_tokens(next((tmp_path / "cache").glob("tokens-*")))
    first = load_tokenizer(data.folder).decode(data.valid[:1])
    bits = found["val_loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / (data.valid_bytes - len(first)), abs=1e-12)
    assert sample["prompt"] == load_tokenizer(data.folder).decode(data.valid[:8], skip_special_tokens=False)
