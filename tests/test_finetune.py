"""Fine-tuning that dies and goes on, two processes with one adapter, a start that changes, and a machine without peft.

Run with `pytest tests/test_finetune.py`.
"""

import json
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import one_thread, result, start, tiny, tiny_hybrid
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybrid_nb.cli.sample import sample_run
from hybrid_nb.config.config import Config, FinetuneConfig, to_yaml
from hybrid_nb.config.errors import ConfigError, DataError, RunError
from hybrid_nb.config.override import override
from hybrid_nb.data.prepare import prepare
from hybrid_nb.data.tokenizer import load_tokenizer
from hybrid_nb.experiments.finetune import problems, tuning_config
from hybrid_nb.runs.runs import Run, load_run
from hybrid_nb.train.checkpoint import checkpoints, read_checkpoint
from hybrid_nb.train.evaluate import evaluate, sample_text
from hybrid_nb.train.launch import train
from hybrid_nb.train.lora import merge

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hybrid-nb[peft]'")
BASES = {"decoder": tiny(steps=4), "experts": tiny(steps=4, ffn="swiglu", n_routed_experts=4, n_shared_experts=1, moe_d_ff=32),
         "hybrid": tiny_hybrid(steps=4)}


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    "A folder for this module's runs and prepared text."
    return tmp_path_factory.mktemp("finetune")


def tuned(work: Path, kind: str = "decoder", rank: int = 4, **changes) -> Config:
    "The tiny run, gone on from a base with problems and their answers."
    base = train(BASES[kind], work / f"base-{kind}", device="cpu", cache=work / "cache")
    config = tuning_config(base, str(problems(work / "cache", 200)), overrides={"steps": 16} | changes)
    return replace(config, finetune=FinetuneConfig(str(base.path), rank=rank))


@pytest.fixture(scope="module")
def whole(work) -> Run:
    "A run of adapters, uninterrupted."
    return train(override(tuned(work), {"finetune.dropout": 0.1}), work / "whole", device="cpu", cache=work / "cache")


@pytest.mark.parametrize("step", [1, 6, 15])
def test_killed_and_run_again(tmp_path, work, whole, step):
    (tmp_path / "config.yaml").write_text(to_yaml(whole.config))
    argv = ["--config", tmp_path / "config.yaml", "--run", tmp_path / "r", "--cache", work / "cache", "--device", "cpu"]
    assert start(argv, ("kill step", step)).wait() == -signal.SIGKILL
    again = start(argv)
    assert again.wait() == 0, again.err
    assert any(line.startswith("step ") for line in again.out.splitlines()) and again.out.splitlines()[-1] == f"done: {tmp_path / 'r'}"
    assert result(load_run(tmp_path / "r")) == result(whole)
    files = [p / "finetune" / "adapter_model.safetensors" for p in (tmp_path / "r", whole.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_killed_while_it_saves_the_adapter(tmp_path, work, whole, monkeypatch):
    config = replace(whole.config, train=replace(whole.config.train, steps=4))
    real = merge

    def die(wrapped):
        raise MemoryError

    monkeypatch.setattr("hybrid_nb.train.lora.merge", die)
    with pytest.raises(MemoryError):
        train(config, tmp_path / "r", device="cpu", cache=work / "cache")
    assert not (tmp_path / "r" / "model").exists() and load_run(tmp_path / "r").info["status"] == "failed"
    monkeypatch.setattr("hybrid_nb.train.lora.merge", real)
    train(config, tmp_path / "r", device="cpu", cache=work / "cache")
    straight = train(config, tmp_path / "s", device="cpu", cache=work / "cache")
    assert result(load_run(tmp_path / "r"))["model"] == result(straight)["model"]


@pytest.mark.parametrize("kind", ["experts", "hybrid"])
def test_other_models_are_tuned_and_stay_themselves(work, kind):
    config = tuned(work, kind, rank=2, steps=6)
    run = train(config, work / f"tuned-{kind}", device="cpu", cache=work / "cache")
    before, after = (load_file(p / "model" / "model.safetensors") for p in (Path(config.finetune.start), run.path))
    moved = {name.removesuffix(".weight").rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved == {*run.info["objective"]["targets"]}
    assert run.records("eval")[-1]["val_loss"] < run.records("eval")[0]["val_loss"]


def test_two_processes_are_one(work):
    same = {"dropout": 0.0, "attn_dropout": 0.0, "log_interval": 1, "steps": 8, "save_interval": 8}
    one = train(tuned(work, grad_accum=2, **same), work / "one", device="cpu", cache=work / "cache")
    (work / "two.yaml").write_text(to_yaml(tuned(work, grad_accum=1, **same)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    argv = ["--config", work / "two.yaml", "--run", work / "two", "--cache", work / "cache", "--device", "cpu"]
    ranks = [start(argv, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    assert [p.wait() for p in ranks] == [0, 0], [p.err for p in ranks]
    assert ranks[0].out.count("step ") == 8 + len(one.records("eval")) and ranks[1].out == ""
    losses = [[r["loss"] for r in run.records("train")] for run in (one, load_run(work / "two"))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    here, there = (load_file(work / name / "finetune" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(t, there[name], atol=1e-5) for name, t in here.items())


def test_a_finished_run_writes_as_its_merged_model(whole, work):
    folder = whole.path / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder / "tokenizer.json")
    assert sample_run(whole.path, prompt="the", tokens=8, temperature=0) == sample_text(model, tokenizer, "the", tokens=8, temperature=0)
    halted = work / "halted"
    shutil.copytree(whole.path, halted)
    shutil.rmtree(halted / "model")
    (halted / "model").mkdir()
    shutil.copy(folder / "tokenizer.json", halted / "model")
    with pytest.raises(RunError, match="run halted is fine-tuned and not finished"):
        sample_run(halted)


def test_a_checkpoint_is_small_and_of_adapters_alone(whole):
    groups = read_checkpoint(checkpoints(whole.path)[0]).groups
    count = whole.info["params"]["trainable"]
    assert sum(t.numel() for t in groups["model"].values()) == count
    assert sum(t.numel() for name, t in groups["optimizer"].items() if "exp_avg" in name) == 2 * count


def test_another_start_under_the_same_name(tmp_path, work, whole):
    config = replace(whole.config, finetune=replace(whole.config.finetune, start=str(tmp_path / "base")))
    (tmp_path / "base").mkdir()
    for file in (Path(whole.config.finetune.start) / "model").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())

    def look(folder):
        if (load_run(folder).records("train") or [{"step": 0}])[-1]["step"] >= 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(config, tmp_path / "r", device="cpu", cache=work / "cache", on_update=look)
    weights = tmp_path / "base" / "model.safetensors"
    save_file({name: t + 1 if "norm" in name else t for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(RunError, match="was made with another objective_sha256"):
        train(config, tmp_path / "r", device="cpu", cache=work / "cache")


def test_without_peft_only_adapters_are_refused(tmp_path, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'hybrid-nb\[peft\]'"):
        train(tuned(work, steps=2), tmp_path / "lora", device="cpu", cache=work / "cache")
    assert train(tuned(work, rank=0, steps=2), tmp_path / "whole", device="cpu", cache=work / "cache").info["status"] == "done"


def asked_of(folder: Path, words: int, count: int = 60) -> str:
    "A file of questions of so many words, answered by one word."
    rows = [{"question": f"{n} " + "why " * words, "answer": "yes"} for n in range(count)]
    (folder / f"{words}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{words}.jsonl")


def test_prompts_that_leave_no_answer_are_refused_before_training(tmp_path, work, capfd):
    base = train(BASES["decoder"], work / "base-decoder", device="cpu", cache=work / "cache")
    same = {"data.valid_fraction": 0.3, "steps": 4, "seq_len": 32}
    with pytest.raises(DataError, match=r"^\d+ of \d+ training prompts \(100%\) are longer than a window of seq_len=32, and "):
        train(tuning_config(base, asked_of(tmp_path, 100), overrides=same), tmp_path / "no", device="cpu", cache=work / "cache")
    assert not (tmp_path / "no" / "model").exists()
    run = train(tuning_config(base, asked_of(tmp_path, 16), overrides=same), tmp_path / "some", device="cpu", cache=work / "cache")
    said = [r["detail"] for r in run.records("event") if r["event"] == "data"]
    assert len(said) == 1 and said[0] in capfd.readouterr().err and "training prompts (100%) are longer" in said[0]
    run = train(tuning_config(base, asked_of(tmp_path, 2), overrides=same), tmp_path / "all", device="cpu", cache=work / "cache")
    assert "data" not in {r["event"] for r in run.records("event")} and capfd.readouterr().err == ""


def test_a_head_of_its_own_goes_on(tmp_path, work):
    "A run whose saved model no longer ties its head is the start of the next, by its weights and not by its old configuration."
    base = tuned(work).finetune.start
    run = load_run(base)
    shutil.copytree(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "model").eval()
    assert run.config.model.tie_embeddings and model.config.tie_embeddings
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "modules_to_save" in name:
                p.normal_(std=0.1)
    merged = wrapped.merge_and_unload()  # by peft alone
    merged.save_pretrained(tmp_path / "base" / "model")
    assert json.loads((tmp_path / "base" / "model" / "config.json").read_text())["tie_embeddings"] is False
    for tied in (False, True):  # as it is, and as an older file has it, which calls tied what differs
        config = json.loads((tmp_path / "base" / "model" / "config.json").read_text()) | {"tie_embeddings": tied}
        (tmp_path / "base" / "model" / "config.json").write_text(json.dumps(config))
        again = load_run(tmp_path / "base")
        tuning = tuning_config(again, str(problems(work / "cache", 200)), overrides={"steps": 1, "eval_interval": 1})
        found = train(replace(tuning, finetune=FinetuneConfig(str(again.path), rank=4)), tmp_path / f"on-{tied}".lower(), device="cpu",
                      cache=work / "cache")
        data = prepare(tuning.data, tuning.model.vocab_size, tuning.train.seq_len, work / "cache")
        batches = data.valid_batches(tuning.train.batch_size, tuning.train.seq_len, tuning.train.eval_batches)
        assert found.records("eval")[0]["val_loss"] == pytest.approx(evaluate(merged.eval(), batches).nats, abs=1e-5)
