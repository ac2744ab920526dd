"""Loss curves of three small runs, and hashes of configurations and fresh weights, compared with recorded ones.

A change that is meant to keep behaviour leaves `tests/golden/curves.json` as it is: losses and weights agree bit for bit on the
kind of machine that recorded them, and losses within 1e-4 nats elsewhere. After a change of behaviour that is wanted, record anew:
`OMP_NUM_THREADS=1 python tests/test_golden.py tests/golden/curves.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
TOLERANCE = 1e-4  # nats
COMMON = {"vocab_size": 400, "bpe_vocab": 400, "grammar_stories": 400, "valid_fraction": 0.05, "seq_len": 64, "batch_size": 4,
          "steps": 24, "warmup_steps": 4, "log_interval": 1, "eval_interval": 12, "save_interval": 24, "eval_batches": 4,
          "precision": "fp32", "compile": "no"}
RUNS = {
    "dense": ("smoke", {"n_layer": 2, "d_model": 64, "n_head": 4, "d_ff": 128, "dropout": 0.1}),
    "experts": ("moe-smoke", {"n_layer": 2, "d_model": 64, "n_head": 4, "d_ff": 128, "moe_d_ff": 64}),
    "hybrid": ("hybrid-smoke", {"n_layer": 2, "d_model": 64, "max_seq_len": 64}),
}
DRAWN = ("smoke", "moe-smoke", "hybrid-smoke", "hybrid-tiny")  # presets small enough to build


def curve(name: str, folder: Path) -> dict:
    "Train one of RUNS: hashes of configuration, data and weights, the loss of each update, validation losses, the hardware."
    from hybrid_nb.cli.verify import hardware_key
    from hybrid_nb.config.presets import get_config
    from hybrid_nb.train.launch import train

    preset, changes = RUNS[name]
    run = train(get_config(preset, COMMON | changes), folder / name, device="cpu", cache=folder / "cache")
    exact = {"weights": run.info["weights"], "losses": [r["loss"] for r in run.records("train")],
             "val_losses": [r["val_loss"] for r in run.records("eval")]}
    hardware = hardware_key(run.info) | {"scan": run.info["resolved"]["scan"]}
    return {key: run.info[key] for key in ("config_hash", "data_hash")} | exact | {"hardware": hardware}


def preset_hashes() -> dict[str, dict[str, str]]:
    "The run name and the hash of the configuration of each preset."
    from hybrid_nb.config.config import config_hash
    from hybrid_nb.config.presets import PRESETS
    from hybrid_nb.runs.runs import run_name

    return {name: {"run": run_name("train", c), "config_hash": config_hash(c)} for name, c in PRESETS.items()}


def fresh_weights() -> dict[str, str]:
    "The hash of freshly drawn weights of each preset in DRAWN, its frozen ones included."
    import torch

    from hybrid_nb.config.presets import get_config
    from hybrid_nb.model.hybrid import make_model
    from hybrid_nb.train.checkpoint import tensor_hash

    found = {}
    for name in DRAWN:
        torch.manual_seed(0)
        found[name] = tensor_hash(make_model(get_config(name).model).state_dict())
    return found


def measure() -> dict:
    "All that is recorded."
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, Path(folder)) for name in RUNS}
    return {"curves": curves, "presets": preset_hashes(), "fresh_weights": fresh_weights()}


def differences(golden: dict, today: dict) -> list[str]:
    "How a run differs from the recorded one: in any bit on the same hardware, else by more than TOLERANCE."
    wrong = [key for key in ("config_hash", "data_hash") if golden[key] != today[key]]
    if golden["hardware"] == today["hardware"]:
        return wrong + [key for key in ("weights", "losses", "val_losses") if golden[key] != today[key]]
    for key in ("losses", "val_losses"):
        gaps = [abs(a - b) for a, b in zip(golden[key], today[key], strict=False)]
        if len(golden[key]) != len(today[key]) or max(gaps) > TOLERANCE:
            wrong.append(f"{key}: {len(today[key])} for {len(golden[key])}, by up to {max(gaps):.1e} nats")
    return wrong


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def today(tmp_path_factory) -> dict:
    "What today's code gives, on one thread in a process of its own."
    path = tmp_path_factory.mktemp("golden") / "curves.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    run = subprocess.run([sys.executable, __file__, path], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_loss_curve_is_the_recorded_one(name, golden, today):
    assert differences(golden["curves"][name], today["curves"][name]) == []


def test_presets_keep_their_names_and_hashes(golden, today):
    assert {k: v for k, v in today["presets"].items() if k in golden["presets"]} == golden["presets"]


def test_fresh_weights_are_the_recorded_ones(golden, today):
    if golden["curves"]["dense"]["hardware"] != today["curves"]["dense"]["hardware"]:
        pytest.skip("weights are compared on the kind of machine that recorded them")
    assert today["fresh_weights"] == golden["fresh_weights"]


def test_a_change_is_found(golden):
    was = golden["curves"]["dense"]
    elsewhere = was | {"hardware": was["hardware"] | {"device_name": "another"}}
    last_bit = [*was["losses"][:-1], was["losses"][-1] + 1e-7]
    assert differences(was, was | {"losses": last_bit}) == ["losses"]
    assert differences(was, elsewhere | {"losses": last_bit, "weights": {}}) == []
    assert differences(was, elsewhere | {"losses": [*was["losses"][:-1], was["losses"][-1] + 2e-4]}) != []
    assert differences(was, elsewhere | {"losses": was["losses"][:-1]}) != []
    assert differences(was, elsewhere | {"data_hash": "0"}) == ["data_hash"]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n")
