"""What counts is targets: in the loss that is logged, in the tokens seen, and in whether a step updates anything.

Run with `pytest tests/test_targets.py`.
"""

import math
import random

import driver
import pytest
import torch
from driver import one_thread

from hybrid_nb.config.errors import RunError
from hybrid_nb.data import batches
from hybrid_nb.train import launch, loop, optim


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder for this module's runs and prepared text."
    with one_thread():
        yield tmp_path_factory.mktemp("targets")


def masked(monkeypatch, seed: int, empty: set[int]):
    "Let training read batches with few targets, and with none at the steps in `empty`; what each update said."
    said, loader, update = [], batches.loader, optim.update

    class Masked:
        def __init__(self, *args):
            self.batches, self.first = loader(*args), args[2]

        def __iter__(self):
            for step, (inputs, targets) in enumerate(self.batches, self.first):
                keep = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1000 * seed + step))
                share = 0.0 if step in empty else random.Random(f"{seed} {step}").random() ** 3
                yield inputs, targets.masked_fill(keep >= share, -100)

    def watched(*args):
        found = update(*args)
        said.append((found[0], int((args[4] != -100).sum())))
        return found

    monkeypatch.setattr(loop, "loader", Masked)
    monkeypatch.setattr(loop, "update", watched)
    return said


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_weighted_and_tokens_counted_by_targets(work, monkeypatch, seed):
    config = driver.tiny(steps=12, log_interval=4, grad_accum=1, seed=seed)
    said = masked(monkeypatch, seed, {2, 8, 9, 10, 11} if seed == 2 else {2, 6})
    run = launch.train(config, work / f"weighted-{seed}", device="cpu", cache=work / "cache")
    told = {r["step"]: r["loss"] for r in run.records("train")}
    for end in (4, 8, 12):
        losses, counts = zip(*said[end - 4 : end], strict=True)
        if not any(counts):
            assert end not in told
            continue
        right = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        assert math.isclose(told.pop(end), right, rel_tol=1e-9)
        assert abs(sum(losses) / 4 - right) > 1e-4  # the mean over steps
    assert not told
    assert run.info["tokens_seen"] == sum(count for _, count in said) < 12 * config.train.batch_size * config.train.seq_len
    assert sum(r["event"] == "empty" for r in run.records("event")) == sum(count == 0 for _, count in said)


def test_a_run_without_any_targets_ends_as_it_began(work, monkeypatch):
    masked(monkeypatch, 0, set(range(12)))
    run = launch.train(driver.tiny(steps=12, weight_decay=0.5), work / "none", device="cpu", cache=work / "cache")
    assert run.info["weights"]["final"] == run.info["weights"]["initial"]
    assert (run.info["tokens_seen"], run.records("train")) == (0, [])
    assert len({r["val_loss"] for r in run.records("eval")}) == 1


def test_an_evaluation_without_targets_says_so(work, monkeypatch):
    nothing = [(torch.zeros(2, 8).long(), torch.full((2, 8), -100))]
    monkeypatch.setattr("hybrid_nb.data.tokens.TokenData.valid_batches", lambda *_, **__: iter(nothing))
    with pytest.raises(RunError, match="nothing to evaluate: no targets in the batches") as error:
        launch.train(driver.tiny(), work / "unseen", device="cpu", cache=work / "cache")
    assert error.value.exit_code == 65 and "\n" not in str(error.value)
