"""Configurations from strangers: names, values and YAML, each understood or refused in one line.

Run with `pytest tests/test_config.py`; `FUZZ=10 pytest ...` draws ten times as many cases.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import types
import typing
import warnings
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from hybrid_nb.account.plan import parse_overrides, plan_run
from hybrid_nb.config.config import (
    ALIASES,
    FIELD_NAMES,
    Config,
    DataConfig,
    HybridConfig,
    ModelConfig,
    TrainConfig,
    asdict,
    config_hash,
    names_of,
    to_yaml,
)
from hybrid_nb.config.documents import load_config
from hybrid_nb.config.errors import ConfigError, brief
from hybrid_nb.config.override import override
from hybrid_nb.config.presets import PRESETS, from_dict, get_config
from hybrid_nb.config.yaml import read_yaml
from hybrid_nb.model.decoder import DecoderConfig
from hybrid_nb.model.hybrid import HybridLanguageModelConfig

MORE = int(os.environ.get("FUZZ", 1))
RECORDS = {"model": ModelConfig, "hybrid": HybridConfig, "train": TrainConfig, "data": DataConfig}
STATES = {True: "frozen-orthogonal", False: "orthogonal", None: "trainable"}  # document 002's table


def line_of(call) -> str | None:
    "The line by which a call is refused, or None; anything else is a fault."
    try:
        call()
    except ConfigError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000, text
        return text
    return None


def numbers(config: Config):
    "All numbers of a configuration."
    def walk(value):
        if isinstance(value, dict):
            yield from (n for v in value.values() for n in walk(v))
        elif isinstance(value, list):
            yield from (n for v in value for n in walk(v))
        elif isinstance(value, int | float):
            yield value
    return list(walk(asdict(config)))


def valid(config: Config):
    "A configuration that was admitted is one that can be written, read back, and computed with."
    assert all(math.isfinite(n) and abs(n) < 1e300 for n in numbers(config))
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert len(config_hash(config)) == 64


def other(record: type, name: str, rng: random.Random):
    "A value that a field may have."
    hint = typing.get_type_hints(record)[name]
    kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice(typing.get_args(kind))
    values = {int: rng.choice([1, 2, 4, 8, 64]), float: rng.choice([0.1, 0.25, 0.5]), bool: rng.random() < 0.5, str: "text"}
    return values.get(kind, (0.8, 0.9))


def made(part: str) -> type:
    "The configuration of transformers that carries a record."
    return HybridLanguageModelConfig if part == "hybrid" else DecoderConfig


ALIASED = [(part, alias, name) for part, record in RECORDS.items() for alias, name in ALIASES.items()
           if name in {f.name for f in dataclasses.fields(record)}]


@pytest.mark.parametrize(("part", "alias", "name"), ALIASED)
def test_a_documents_name_is_the_fields_own_everywhere(part, alias, name, tmp_path):
    record, rng = RECORDS[part], random.Random(f"{part}{alias}")
    base = get_config("hybrid-smoke" if part == "hybrid" else "smoke")
    section = "model" if part == "hybrid" else part
    for _ in range(2):
        value = other(record, name, rng)
        ways = [lambda n, v=value: record(**{n: v}), lambda n, v=value: override(base, {n: v}),
                lambda n, v=value: override(base, {f"{section}.{n}": v}),
                lambda n, v=value: override(base, parse_overrides(f"{n}={v}")),
                lambda n, v=value: from_dict({"preset": base.name, section: {n: v}})]
        if section == "model":
            ways += [lambda n, v=value: made(part)(**{n: v}).to_dict(),
                     lambda n, v=value: made(part).from_dict(made(part)().to_dict(), **{n: v}).to_dict()]
        for way in ways:
            refused = [line_of(lambda n=n, way=way: way(n)) for n in (alias, name)]
            assert refused[0] == refused[1] or "contradicts" not in refused[0]
            if refused == [None, None]:
                assert way(alias) == way(name)
        (tmp_path / "a.yaml").write_text(f"preset: {base.name}\n{section}: {{{alias}: {json.dumps(value)}}}\n")
        (tmp_path / "b.yaml").write_text(f"preset: {base.name}\nname: a\n{section}: {{{name}: {json.dumps(value)}}}\n")
        found = [line_of(lambda n=n: load_config(tmp_path / n)) for n in ("a.yaml", "b.yaml")]
        assert found[0] == found[1]
        if found[0] is None:
            assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("freeze", STATES)
def test_freeze_qk_freezes(freeze):
    "The gap of document 002: what the name says is what the weights do, in a model as in a file."
    state = STATES[freeze]
    meant = ModelConfig(n_layer=1, d_model=16, n_head=2, vocab_size=32, max_seq_len=8, q=state, k=state)
    shape = dict(layers=1, hidden_dim=16, num_heads=2, vocab_size=32, max_seq_len=8)
    config = DecoderConfig(**shape, freeze_qk=freeze)
    assert config.shape == meant == ModelConfig(**shape, freeze_qk=freeze) and config.freeze_qk is meant.freeze_qk is freeze
    for said in (freeze, str(freeze), str(freeze).lower()):
        for values in ({"freeze_qk": said}, {"model.freeze_qk": said}):
            assert override(Config(), values).model == dataclasses.replace(ModelConfig(), q=state, k=state)
    assert plan_run(device="cpu", freeze_qk=str(freeze)).config.model.q == state
    trained = {name for name, p in AutoModelOf(config).named_parameters() if p.requires_grad and ("q_proj" in name or "k_proj" in name)}
    assert bool(trained) == (freeze is not True)
    for name in "qk":  # both spellings: equal, or a contradiction
        for value in ("trainable", "orthogonal", "frozen-orthogonal", "frozen-gaussian"):
            told = line_of(lambda n=name, v=value: DecoderConfig(**shape, freeze_qk=freeze, **{n: v}))
            assert (told is None) == (value == state) and (told is None or "contradicts" in told)


def AutoModelOf(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def misspelled(name: str, rng: random.Random) -> str:
    "A name with one letter dropped, doubled or exchanged with the next."
    i = rng.randrange(1, len(name) - 1)
    return rng.choice([name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name[:i] + name[i + 1] + name[i] + name[i + 2 :]])


def test_a_misspelling_is_refused_and_the_nearest_named():
    rng, long = random.Random(0), sorted(name for name in FIELD_NAMES if len(name) > 7)
    named = 0
    for _ in range(60):
        name = rng.choice(long)
        word = misspelled(name, rng)
        if word in FIELD_NAMES:
            continue
        model = name in names_of({f.name for record in (ModelConfig, HybridConfig) for f in dataclasses.fields(record)})
        calls = [lambda w=word: override(Config(), {w: 1}), lambda w=word: plan_run(device="cpu", **{w: 1})]
        calls += [lambda w=word, k=k: k(**{w: 1}) for k in (DecoderConfig, HybridLanguageModelConfig, ModelConfig) if model]
        lines = [line_of(call) for call in calls]
        assert all(lines), (word, lines)
        named += all(f"did you mean {name!r}" in line for line in lines)
    assert named >= 54  # a slip may be nearer to another name
    for word, near in (("srte_rank", "srte_factorized_rank"), ("aux_loss_apha", "aux_loss_alpha")):
        for kind in (DecoderConfig, HybridLanguageModelConfig):
            assert near in line_of(lambda k=kind, w=word: k(**{w: 1}))
            assert near in line_of(lambda k=kind, w=word: k.from_dict(k().to_dict() | {w: 1}))


def test_what_transformers_writes_is_read(tmp_path):
    "config.json goes there and back, of every preset, with the keys of other versions and tools; the shape is the same."
    tools = {"auto_map": {"AutoConfig": "a.B"}, "torch_dtype": "float32", "_name_or_path": "x", "max_length": 20, "pad_token_id": 0,
             "quantization_config": None, "unsloth_version": "2025.1"}
    for name, config in PRESETS.items():
        kind = HybridLanguageModelConfig if isinstance(config.model, HybridConfig) else DecoderConfig
        made = kind.from_model(config.model, eos_token_id=3)
        made.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        again = AutoConfig.from_pretrained(tmp_path / name)
        assert again.shape == config.model and config_hash(again.shape) == config_hash(config.model)
        again.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == written
        assert not set(ALIASES) & set(written)
        old, new = {"pruned_heads": {}, "tie_encoder_decoder": False}, {"a_new_key": 1, "layer_kinds": []}
        for version, more in (("4.30.0", old), ("99.1", new)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert kind.from_dict(written | tools | more | {"transformers_version": version}).shape == config.model
            told = [str(w.message) for w in caught if "without effect" in str(w.message)]
            assert len(told) == 1 + (2 if version == "99.1" else 0), told


# ---------------------------------------------------------------- YAML

def test_a_value_means_the_same_in_a_file_and_on_a_command_line(tmp_path):
    texts = ["no", "yes", "off", "True", "FALSE", "010", "0x10", "1:30", "1_000", "5e-4", "1e3", ".5", "+3", "null", "~", "2025-01-18",
             "0.9,0.98", "nan", ".inf", "-1", "9" * 30, "auto", "none", "0o17", "1.50", "007", "1e400"]
    fields = ["train.compile", "train.pin_memory", "train.steps", "train.lr", "train.betas", "train.late_dropout", "train.seed",
              "data.source", "model.q"]
    for field in fields:
        part, name = field.split(".")
        for text in texts:
            (tmp_path / "smoke.yaml").write_text(f"{part}:\n  {name}: {text}\n")
            found = []
            for way in (lambda: load_config(tmp_path / "smoke.yaml"), lambda f=field, t=text: override(get_config(), {f: t})):
                told = line_of(way)
                found.append(way() if told is None else None)
            if text not in ("null", "~"):  # YAML's words for nothing, which is no text
                assert found[0] == found[1], (field, text, found)


def test_the_plain_loader_takes_what_the_strict_one_refuses():
    "Negative control: PyYAML reads 8 for 010, 90 for 1:30, False for no, and the second of two blocks; a bomb is small until it is shown."
    text = "a: 010\nb: 1:30\nc: no\ntrain: {lr: 1}\ntrain: {steps: 2}\n"
    assert yaml.safe_load(text) == {"a": 8, "b": 90, "c": False, "train": {"steps": 2}}
    assert "stands twice" in line_of(lambda: read_yaml(text, "a.yaml"))
    assert read_yaml(text.replace("train: {steps: 2}\n", ""), "a.yaml") == {"a": "010", "b": "1:30", "c": "no", "train": {"lr": 1}}
    names = "abcdefghijkl"
    bomb = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in itertools.pairwise(names))
    assert isinstance(yaml.safe_load(bomb), dict) and "with aliases written out" in line_of(lambda: read_yaml(bomb, "a.yaml"))
    with pytest.raises(RecursionError):
        yaml.safe_load("[" * 2000)


def plain(rng: random.Random, depth: int = 0):
    "A random value that YAML's core can write."
    if depth < 3 and rng.random() < 0.5:
        values = [plain(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if rng.random() < 0.4 else {f"k{i}": value for i, value in enumerate(values)}
    words = ["text", "no", "010", "", "1:30", "ü 字", "a: b", "# c", "'", "null", "2025-01-18"]
    return rng.choice([None, True, False, rng.randrange(-999, 999), rng.random(), *words])


def test_the_strict_loader_reads_what_safe_dump_writes():
    "Independent reference: PyYAML's own writer, over random values."
    rng = random.Random(0)
    for _ in range(100 * MORE):
        value = plain(rng)
        assert read_yaml(yaml.safe_dump(value, allow_unicode=rng.random() < 0.5, default_flow_style=rng.random() < 0.5), "a") == value


SEEDS = [
    to_yaml(get_config("smoke")), to_yaml(get_config("hybrid-smoke")),
    "model: {layers: 6, hidden_dim: 512}\noptimizer:\n  type: AdamW\n  lr: 5e-4\ntraining:\n  max_steps: 100\n  mixed_precision: fp16\n",
    "n_layers: 6\nd_model: 512\nn_heads: 8\nfreeze_qk: true\nlearning_rate: 3e-4 (warmup 2K steps, cosine decay)\n",
    "model:\n  hidden_size: 64\n  num_layers: 2\n  srte_encoding: sincos\ntrain:\n  max_steps: 3\n",
    "experiment: {name: a}\nmodel: {teacher: t, student: smoke}\nprojector:\n  mlp_ratio: 1.0\ntraining:\n  steps: 5\nnotes: [a]\n"]
PIECES = ["[", "]", "{", "}", "- ", ": ", "\n", "  ", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os.system ", "'", '"', "|\n", "? ",
          "%YAML 1.1\n", "---\n", "...", "\t", "\0", "\ud83d", "\ufeff", "#", ".inf", ".nan", "010", "1:30", "no", "9" * 400, "null", "~",
          "x" * 5000, "[" * 2000, "- " * 500, "&b [*b, *b]", "model: 5\n", "train: {lr: 1e999}\n", "optimizer: [1]\n", "1: 2\n",
          "resources: {gpu: 1}\n", "preset: [1]\n", "freeze_qk: maybe\n"]
SCALARS = ["1", "2", "64", "128", "0.5", "1e-3", "true", "no", "auto", "none", "smoke", "-1", "0", "1e999", "[0.9, 0.98]", "[]", "{}",
           "{a: b}", "'5'", "1000000000", str(2**64), "1_000", "+1", "<<", "hybrid", "orthogonal", "ü"]


def hostile(rng: random.Random) -> bytes:
    "A file that was right once: values exchanged, pieces put in, cut out or doubled, now and then in another encoding."
    lines = rng.choice(SEEDS).splitlines(True)
    for _ in range(rng.randrange(1, 4)):
        i, piece = rng.randrange(len(lines)), rng.choice(PIECES)
        name, colon, _ = lines[i].partition(": ")
        mutated = [lines[i][: rng.randrange(len(lines[i]) + 1)], piece + lines[i], lines[i] * 2]
        exchanged = [f"{name}: {word}\n" for word in (piece, rng.choice(SCALARS), rng.choice(SCALARS))]
        lines[i] = rng.choice(exchanged + mutated if colon else mutated)
    data = "".join(lines).encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace")
    recoded = [b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data + b"\x80", data.replace(b"\n", b"\r")]
    return data if rng.random() < 0.9 else rng.choice(recoded)


def test_a_fuzzed_file_is_a_configuration_or_one_line(tmp_path, capsys):
    rng, ends = random.Random(12), {True: 0, False: 0}
    for _ in range(10 * MORE):
        path = tmp_path / "fuzz.yaml"
        path.write_bytes(hostile(rng))
        told = line_of(lambda path=path: valid(load_config(path)))
        ends[told is None] += 1
        capsys.readouterr()
    assert ends[False]


# ---------------------------------------------------------------- parameters

BOMB = "x"
for _ in range(40):
    BOMB = [BOMB] * 9
VALUES = [
    "", " ", "nan", "inf", "-inf", ".inf", "-1", 0, "0", 1, 2, 3, 64, 4096, "1e400", "9" * 400, 10**400, "9" * 9000, 2**64, 2**63, 2**31,
    10**9, -(2**63), 0.5, 1e308, -0.0, 1e-320, math.nan, math.inf, True, False, None, [], [1], ["a", {}], {}, BOMB, "no", "yes", "auto",
    "010", "1:30", "\0", "\ud83d", "x" * 100_000, "../..", "*", "ü", "trainable", "frozen-orthogonal", "swiglu", "yarn", "lr=1",
    "lr=1 lr=2", "'", "d_model=64 n_head=3", "smoke", "base", "hybrid-tiny", "cpu"]


def parameter_set(rng: random.Random, names: list[str]) -> dict:
    "Names that are, nearly are, or are no parameters, with any values; some of them as overrides."
    found = {}
    for _ in range(rng.randrange(1, 4)):
        word = rng.choice(names)
        found[rng.choice([word] * 9 + [misspelled(word, rng) if len(word) > 3 else "", "x" * 10_000])] = rng.choice(VALUES)
    if rng.random() < 0.3:
        word, value = rng.choice(names), rng.choice([v for v in VALUES if isinstance(v, str | int | float) and len(brief(v)) < 30])
        found["overrides"] = rng.choice([f"{word}={value}", f"train.{word}={value}", f"model.{word}='{value}'", f"{word} {value}"])
    return found


def test_a_fuzzed_set_of_parameters_is_a_plan_or_one_line():
    from hybrid_nb.cli.main import plan_text

    names, rng, ends = sorted([*FIELD_NAMES, "overrides", "full", "run", *("model", "steps", "lr") * 9]), random.Random(3), []

    def plan(values):
        made = plan_run(**values)
        valid(made.config), valid(made.whole)
        assert len(plan_text(made, 1e11)) < 5000

    for _ in range(50 * MORE):
        values = {"device": "cpu"} | parameter_set(rng, names)
        ends.append(line_of(lambda values=values: plan(values)) is None)
    assert any(ends) and not all(ends)


def test_a_fuzzed_set_of_parameters_is_admitted_or_one_line():
    from hybrid_nb.account.plan import cast_parameters
    from hybrid_nb.report.pipelines import declared

    rng = random.Random(4)
    for path in sorted((Path(__file__).parents[1] / "pipelines").glob("*.ipynb")):
        cells = [types.SimpleNamespace(source="".join(c["source"]), metadata=c["metadata"]) for c in json.loads(path.read_text())["cells"]]
        parameters = declared(types.SimpleNamespace(cells=cells))
        for _ in range(4 * MORE):
            values = parameter_set(rng, [*parameters, "freeze_qk", "max_steps", "hidden_dim"])
            line_of(lambda values=values, parameters=parameters: json.dumps(cast_parameters(parameters, values)))


def test_fuzzed_constructors_are_records_or_one_line():
    rng = random.Random(5)
    kinds = [*RECORDS.values(), DecoderConfig, HybridLanguageModelConfig]
    for _ in range(50 * MORE):
        kind, values = rng.choice(kinds), parameter_set(rng, sorted(FIELD_NAMES))
        line_of(lambda kind=kind, values=values: kind(**values))
        line_of(lambda values=values: valid(override(get_config(rng.choice(sorted(PRESETS))), values)))
        line_of(lambda values=values: valid(from_dict({rng.choice(["model", "train", "data", "distill", "finetune"]): values})))
