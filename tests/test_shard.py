"""Training in shards on two gloo processes: the losses of one process, real shards, and checkpoints that every layout reads.

Run with `pytest tests/test_shard.py`. torchrun itself starts once; the other cases fork the two ranks.
"""

import json
import shutil
from pathlib import Path

import driver
import pytest
from driver import one_thread, result, start, tiny
from safetensors.torch import load_file
from test_torchrun import ended, gap, two

from hybrid_nb.account import layout
from hybrid_nb.config import errors
from hybrid_nb.config.config import to_yaml
from hybrid_nb.config.errors import ConfigError
from hybrid_nb.config.presets import get_config
from hybrid_nb.experiments import parallel
from hybrid_nb.runs.runs import Run, load_run
from hybrid_nb.train import launch
from hybrid_nb.train.checkpoint import checkpoints, read_checkpoint

SAME = {"dropout": 0.0, "attn_dropout": 0.0, "log_interval": 1, "steps": 10, "save_interval": 5, "eval_interval": 5,
        "gradient_checkpointing": True, "grad_noise": 0.2, "k": "frozen-orthogonal"}
ONE, TWO = tiny(**SAME, grad_accum=2), tiny(**SAME, grad_accum=1)
SHARDED = ("zero1", "zero2", "zero3", "tp2")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    "A folder for this module's runs and prepared text."
    with one_thread():
        yield tmp_path_factory.mktemp("shard")


@pytest.fixture(scope="module")
def single(work) -> Run:
    "The global batches in one process."
    return launch.train(ONE, work / "single", device="cpu", cache=work / "cache")


def command(work: Path, name: str, mode: str, config=None) -> list:
    "The arguments of a run in a layout."
    path = work / f"{name}.yaml"
    path.write_text(to_yaml(config or (ONE if mode == "tp2" else TWO)))
    return ["--config", path, "--cache", work / "cache", "--device", "cpu", "--folder", work / name, "--parallel", mode]


@pytest.fixture(scope="module")
def sharded(work, single) -> dict[str, Run]:
    "The same in each layout on two processes."
    for mode in SHARDED:
        assert ended(two(command(work, mode, mode))) == [0, 0], mode
    return {mode: load_run(work / mode) for mode in SHARDED}


@pytest.mark.parametrize("mode", SHARDED)
def test_a_layout_loses_what_one_process_loses(sharded, single, mode):
    "Noise on the gradients, clipping, recomputed activations and frozen keys included."
    run = sharded[mode]
    assert (run.info["world_size"], run.info["parallel"], run.info["tokens_seen"]) == (2, mode, single.info["tokens_seen"])
    assert len(run.records("train")) == 10 and gap(run, single, "train", "loss") < 1e-5
    assert gap(run, single, "train", "grad_norm") < 1e-3 and gap(run, single, "eval", "val_loss") < 1e-5
    assert [r["text"] for r in run.records("sample")] == [r["text"] for r in single.records("sample")]
    a, b = (load_file(r.path / "model/model.safetensors") for r in (run, single))
    assert a.keys() == b.keys() and max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-3


@pytest.mark.parametrize("mode", SHARDED)
def test_a_checkpoint_has_whole_tensors(sharded, single, mode):
    there, here = (read_checkpoint(checkpoints(r.path)[0]) for r in (sharded[mode], single))
    for group in ("model", "optimizer"):
        assert {n: t.shape for n, t in there.groups[group].items()} == {n: t.shape for n, t in here.groups[group].items()}
        assert max(float((t - here.groups[group][n]).abs().max()) for n, t in there.groups[group].items()) < 1e-3


def test_the_same_batches_on_both_are_another_run(work, single):
    "The negative control of the equality."
    assert ended(two(command(work, "naive", "zero2"), ("same batches",))) == [0, 0]
    assert gap(load_run(work / "naive"), single, "train", "loss") > 1e-3


def halfway(work: Path, run: Run, name: str) -> Path:
    "A copy of a run whose last checkpoint is that of its fifth step."
    shutil.copytree(run.path, work / name)
    shutil.rmtree(work / name / "checkpoints/step-10")
    return work / name


@pytest.mark.parametrize("mode", SHARDED)
def test_two_processes_are_continued_by_one(sharded, single, work, mode):
    readers = 1 if mode == "tp2" else 2
    config = launch.move(halfway(work, sharded[mode], f"{mode}-half"), work / f"{mode}-one", 1)
    assert config.train.grad_accum == (ONE if readers == 1 else TWO).train.grad_accum * readers
    run = launch.train(config, work / f"{mode}-one", device="cpu", cache=work / "cache")
    assert [r["step"] for r in run.records("train")] == list(range(1, 11)) and "parallel" not in run.info
    assert gap(run, single, "train", "loss") < 1e-5 and gap(run, sharded[mode], "train", "loss") < 1e-5


def test_one_process_is_continued_by_two(single, work):
    config = launch.move(halfway(work, single, "one-half"), work / "one-two", 2)
    assert config == TWO
    assert ended(two(command(work, "one-two", "zero3", config))) == [0, 0]
    assert gap(load_run(work / "one-two"), single, "train", "loss") < 1e-5


def test_a_killed_layout_resumes_bit_for_bit(sharded, work):
    assert ended(two(command(work, "killed", "zero3"), ("kill", "mid-record")))[0] == -9
    assert ended(two(command(work, "killed", "zero3"))) == [0, 0]
    assert result(load_run(work / "killed")) == result(sharded["zero3"])


def test_what_one_rank_sees_all_decide(work):
    "NaN in a gradient, or an infinite loss, on either rank, in every layout: both raise, or neither."
    assert ended(two([], ("one rank sees", work))) == [0, 0]
    first, second = (json.loads((work / f"saw-{rank}.json").read_text()) for rank in (0, 1))
    naive = first.pop("naive"), second.pop("naive")
    assert naive[0] == "went on" and "nan" in naive[1], "the negative control: under tp2 each rank decided alone, and they parted"
    kinds = {"ddp": {"whole"}, "zero1": {"whole"}, "zero2": {"sharded"}, "zero3": {"sharded"}, "tp2": {"whole", "sharded"}}
    for case, told in first.items():
        mode, what, _ = case.split()
        if what in ("whole", "sharded") and what not in kinds[mode]:
            assert told is None, case
        elif what == "nothing":
            assert (told, second[case]) == ("went on", "went on"), case
        else:
            wrong = "loss inf" if what == "loss" else "gradient norm nan"
            assert wrong in told and wrong in second[case], f"{case}: {told}; {second[case]}"


@pytest.mark.parametrize("rank", [0, 1])
def test_halves_stop_together_and_go_on(sharded, work, rank):
    "One rank of tp2 meets NaN; both end, with a checkpoint from which the same command continues."
    name = f"nan-{rank}"
    ranks = two(command(work, name, "tp2"), ("nan gradient", 6, rank))
    assert ended(ranks) == [errors.NUMERIC] * 2
    assert "gradient norm nan at step 7" in ranks[0].err and load_run(work / name).info["status"] == "failed"
    assert checkpoints(work / name)[0].name == "step-6"
    assert ended(two(command(work, name, "tp2"))) == [0, 0]
    assert result(load_run(work / name)) == result(sharded["tp2"])


def test_a_hybrid_model_in_shards(work):
    same = {"dropout": 0.0, "attn_dropout": 0.0, "branch_dropout": 0.0, "log_interval": 1, "steps": 6, "eval_interval": 6}
    config = driver.tiny_hybrid(**same, grad_accum=1)
    assert ended(two(command(work, "hybrid", "zero2", config))) == [0, 0]
    one = launch.train(driver.tiny_hybrid(**same, grad_accum=2), work / "hybrid-one", device="cpu", cache=work / "cache")
    assert gap(load_run(work / "hybrid"), one, "train", "loss") < 1e-5 and gap(load_run(work / "hybrid"), one, "eval", "val_loss") < 1e-5


def test_what_shards_do_not_divide_is_refused(work):
    with pytest.raises(ConfigError, match="2 shards do not divide d_ff=63, as parallel='tp2' needs"):
        layout.check_layout(tiny(**SAME, d_ff=63), "tp2", 2)
    alone = start(command(work, "alone", "zero3"))
    assert alone.wait() == errors.USAGE
    assert alone.err == "ConfigError: parallel='zero3' needs several processes, and there is 1: start them by torchrun\n"
    assert not (work / "alone").exists()


def test_uneven_targets_and_real_shards():
    "Under torchrun, with biases and without tied weights."
    config = get_config("smoke", {
        "n_layer": 2, "d_model": 16, "n_head": 4, "n_kv_head": 2, "d_ff": 24, "vocab_size": 61, "attn_bias": True, "ffn_bias": True,
        "position": "learned", "tie_embeddings": False, "q": "frozen-gaussian", "seq_len": 12, "batch_size": 8, "grad_accum": 2,
        "grad_clip": 0.3, "warmup_steps": 1, "lr": 0.01})
    _, y = parallel.trial_batch(config, 0)
    counts = [int((part != -100).sum()) for part in y.split(4, dim=1)]
    assert counts[0] * 2 < counts[1]
    trials = json.loads(json.dumps(parallel.run_trials(config)))
    assert set(trials) == {"one", *layout.MODES}
    (one,) = trials["one"]["bytes"]
    for mode in layout.MODES:
        assert parallel.gap(trials, mode) < 1e-5 and parallel.gap(trials, mode, "norms") < 1e-4, mode
    assert {row[-1] for row in parallel.trial_table(trials, config).cells} == {"yes"}
    for mode in ("zero2", "zero3"):
        for name in ("weights", "gradients", "optimizer state"):
            assert sum(rank[name] for rank in trials[mode]["bytes"]) == one[name], (mode, name)
            assert all(abs(rank[name] / one[name] - 0.5) < 0.02 for rank in trials[mode]["bytes"])
    assert [rank["frozen weights"] * 2 for rank in trials["tp2"]["bytes"]] == [one["frozen weights"]] * 2
    assert sum(rank["optimizer state"] for rank in trials["zero1"]["bytes"]) == one["optimizer state"]
