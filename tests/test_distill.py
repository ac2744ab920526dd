"""Teachers and distillation, tried for real: kills, lost state, other tokenizers, the hub's cache, questions and answers.

Run with `pytest tests/test_distill.py`. Each fault is also played to a naive program, which must fail it.
"""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from driver import ENV, one_thread, result, start, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hybrid_nb.config.config import Config, DistillConfig, asdict, config_hash, to_yaml
from hybrid_nb.config.errors import RunError
from hybrid_nb.data.prepare import prepare
from hybrid_nb.data.tokenizer import load_tokenizer
from hybrid_nb.model.projector import KVDimensionProjector, merge_heads
from hybrid_nb.runs.runs import Run, load_run
from hybrid_nb.train import checkpoint, loop
from hybrid_nb.train.checkpoint import checkpoints, read_checkpoint, tensor_hash
from hybrid_nb.train.distill import Distillation
from hybrid_nb.train.launch import train
from hybrid_nb.train.teacher import KVExtractor, as_teacher, extract, load_teacher, relative_distance, token_rows

SHAPES = dict(num_attention_heads=6, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, cache) -> Path:
    "A folder of teachers: a run of ours, a Qwen2 and a Llama of random weights with grouped heads, and one with another tokenizer."
    folder = tmp_path_factory.mktemp("teachers")
    train(tiny(n_layer=3, d_model=48, steps=4), folder / "ours", device="cpu", cache=cache)
    torch.manual_seed(0)
    qwen = Qwen2Config(vocab_size=400, hidden_size=48, num_hidden_layers=3, **SHAPES)
    Qwen2ForCausalLM(qwen).save_pretrained(folder / "qwen")
    llama = LlamaConfig(vocab_size=400, hidden_size=60, num_hidden_layers=5, head_dim=12, **SHAPES)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    shutil.copytree(folder / "qwen", folder / "foreign")
    other = prepare(replace(tiny().data, bpe_vocab=300), 300, 32, cache)
    load_tokenizer(other.folder).save(str(folder / "foreign" / "tokenizer.json"))
    return folder


def taught(teachers: Path, names: str = "ours,qwen,llama", config: Config | None = None, **options) -> Config:
    "The tiny run, distilled."
    return replace(config or tiny(), distill=DistillConfig(",".join(f"{teachers}/{n}" for n in names.split(",")), **options))


@pytest.fixture(scope="module")
def whole(teachers, cache, tmp_path_factory) -> Run:
    "The distilled run, uninterrupted."
    config = taught(teachers, weights="learned", cosine=0.1)
    return train(config, tmp_path_factory.mktemp("whole") / "r", device="cpu", cache=cache)


def test_three_teachers_teach(whole):
    parts = whole.records("train")[-1]["parts"]
    assert {key.partition("/")[0] for key in parts if "/" in key} == {"ours", "qwen", "llama"}
    assert len(parts) == 3 * 2 * 2 + 1 + 3 and all(np.isfinite(x).all() for x in parts.values())
    about = whole.info["objective"]["teachers"]
    assert [about[n]["shape"]["kv_dim"] for n in ("ours", "qwen", "llama")] == [48, 16, 24]
    projector = KVDimensionProjector.load(whole.path / "projector" / "projector.safetensors", student_d_model=32, student_layers=2)
    assert sum(p.numel() for p in projector.parameters()) == whole.info["objective"]["projector"]["parameters"]
    told = json.loads((whole.path / "projector" / "distill.json").read_text())
    assert sum(told["weights"].values()) == pytest.approx(1)


@pytest.mark.parametrize("step", [1, 6, 15])
def test_killed_and_run_again(tmp_path, whole, cache, step):
    (tmp_path / "config.yaml").write_text(to_yaml(whole.config))
    argv = ["--config", tmp_path / "config.yaml", "--run", tmp_path / "r", "--cache", cache, "--device", "cpu"]
    assert start(argv, ("kill step", step)).wait() == -signal.SIGKILL
    again = start(argv)
    assert again.wait() == 0, again.err
    assert result(load_run(tmp_path / "r")) == result(whole)
    files = [p / "projector" / "projector.safetensors" for p in (tmp_path / "r", whole.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def interrupted(config: Config, folder: Path, cache: Path, step: int):
    "A run that ends with an exception at its first record from a step on."
    def look(path):
        if (load_run(path).records("train") or [{"step": 0}])[-1]["step"] >= step:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(config, folder, device="cpu", cache=cache, on_update=look)


def lost_projector(patch):
    real = checkpoint.load_training_state_dict
    patch.setattr(Distillation, "load_state_dict", lambda self, state: None)
    patch.setattr(loop, "load_training_state_dict",
                  lambda groups, model, optimizer: isinstance(model, Distillation) or real(groups, model, optimizer))


def forgotten_parts(patch):
    patch.setattr(Distillation, "load_state_dict", lambda self, state: (torch.nn.Module.load_state_dict(self, state), self.sums.zero_(),
                                                                        self.total.zero_()))


@pytest.mark.parametrize("naive", [None, lost_projector, forgotten_parts])
def test_naive_resuming_ends_elsewhere(tmp_path, whole, cache, monkeypatch, naive):
    interrupted(whole.config, tmp_path / "r", cache, 9)
    if naive:
        naive(monkeypatch)
    again, expected = result(train(whole.config, tmp_path / "r", device="cpu", cache=cache)), result(whole)
    assert (again == expected) == (naive is None)
    assert (again["records"] == expected["records"]) == (naive is None)


def test_runs_without_distillation_are_what_they_were(tmp_path, whole, cache):
    assert "distill" not in asdict(tiny()) and "distill" in asdict(whole.config)
    assert config_hash(tiny()) != config_hash(whole.config)
    run = train(tiny(), tmp_path / "r", device="cpu", cache=cache)
    assert run.info["data_hash"] == whole.info["data_hash"] and run.info["weights"]["initial"] == whole.info["weights"]["initial"]
    assert "objective" not in run.info and not (run.path / "projector").exists()
    with pytest.raises(RunError, match="is of another configuration: distill is None there and {"):
        train(whole.config, run.path, device="cpu", cache=cache)


def test_another_teacher_under_the_same_name(tmp_path, teachers, cache):
    shutil.copytree(teachers / "qwen", tmp_path / "t")
    config = taught(tmp_path, "t")
    interrupted(config, tmp_path / "r", cache, 9)
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=400, hidden_size=48, num_hidden_layers=3, **SHAPES)).save_pretrained(tmp_path / "t")
    with pytest.raises(RunError, match="was made with another objective_sha256"):
        train(config, tmp_path / "r", device="cpu", cache=cache)


def test_another_tokenizer_is_read_by_characters(tmp_path, teachers, cache):
    run = train(taught(teachers, "foreign"), tmp_path / "r", device="cpu", cache=cache)
    about = run.info["objective"]["teachers"]["foreign"]
    assert about["translated"] and about["kept"]["length"] > 32, "a smaller vocabulary needs more tokens for a text"
    first, *_, last = (r["parts"]["kv"] for r in run.records("train"))
    assert last < first


def test_questions_and_answers(tmp_path, teachers, cache):
    rows = [{"question": f"Tom has {a} pears and gets {b}. How many?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
            for a in range(20) for b in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(tmp_path / "sums.jsonl"), "text_key": "question", "answer_key": "answer"}
    config = taught(teachers, "qwen", tiny(**source))
    data = prepare(config.data, 400, 32, cache)
    tokenizer, (x, y) = load_tokenizer(data.folder), data.batch(0, config.train)
    flat = " ".join(tokenizer.decode(row[row != -100].tolist()) for row in y.flatten(0, 1))
    assert "Tom" not in flat and "How many" not in flat and "####" in flat
    assert 0.2 < float((y != -100).float().mean()) < 0.9 and (x >= 0).all()
    run = train(config, tmp_path / "r", device="cpu", cache=cache)
    first, *_, last = (r["val_loss"] for r in run.records("eval"))
    assert last < first and run.records("eval")[-1]["tokens"] < data.valid_tokens


# The extraction


DYING = """
import os, signal, sys
from pathlib import Path
import torch
from hybrid_nb.runs import files
from hybrid_nb.train import teacher
real, seen = files._sync, []
def sync(path):
    seen.append(path)
    if len(seen) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
files._sync = sync
torch.manual_seed(0)
ids = torch.randint(300, (24, 16))
teacher.extract(teacher.load_teacher(sys.argv[1]), teacher.token_rows(ids), Path(sys.argv[2]), shard_bytes=20_000)
"""


def test_an_extraction_that_was_killed_goes_on(tmp_path, teachers):
    torch.manual_seed(0)
    ids, teacher = torch.randint(300, (24, 16)), load_teacher(teachers / "qwen")
    died = subprocess.run([sys.executable, "-c", DYING, teachers / "qwen", tmp_path / "kv"], env=ENV, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (left,) = (tmp_path / "kv").glob("kv-*")
    assert not (left / "manifest.json").exists() and list(left.glob(".tmp-*"))
    whole = len(list(left.glob("shard-*")))
    store = extract(teacher, token_rows(ids), tmp_path / "kv", shard_bytes=20_000)
    assert 0 < whole < store.info["shards"] and store.info["rows_read"] == 24 - whole * store.shard_rows
    assert not list(left.glob(".tmp-*"))
    clean = extract(teacher, token_rows(ids), tmp_path / "clean", shard_bytes=20_000)
    for a, b in zip(store.read(range(24)), clean.read(range(24)), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_naive_extraction_is_taken_for_whole(tmp_path):
    code = """
        import os, signal, sys, numpy as np
        out = np.lib.format.open_memmap(sys.argv[1], "w+", "<f4", (24, 8))
        out[:12] = 1
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "kv.npy"], env=ENV)
    assert np.load(tmp_path / "kv.npy").shape == (24, 8) and not np.load(tmp_path / "kv.npy")[12:].any(), "zeros, and nobody knows"


def test_a_teacher_out_of_the_hubs_cache(tmp_path, teachers):
    snapshot = tmp_path / "hub" / "models--some--qwen.2-0" / "snapshots" / ("0" * 40)
    shutil.copytree(teachers / "qwen", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = "import sys; from hybrid_nb.train.teacher import load_teacher; print(load_teacher(sys.argv[1]).sha256)"
    env = ENV | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found, absent = (subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True)
                     for name in ("hf:some/qwen.2-0", "hf:some/llama"))
    assert found.stdout.strip() == load_teacher(teachers / "qwen").sha256, found.stderr
    assert absent.returncode and "RunError: teacher hf:some/llama cannot be read: " in absent.stderr.splitlines()[-1]


def test_code_of_a_model_is_never_run(tmp_path, teachers):
    shutil.copytree(teachers / "qwen", tmp_path / "evil")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(RunError, match="teacher .*evil cannot be read: "):
        load_teacher(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_precision_and_padding(teachers):
    torch.manual_seed(0)
    ids = torch.randint(300, (2, 16))
    exact, half = (KVExtractor(load_teacher(teachers / "llama", p))(ids) for p in ("fp32", "bf16"))
    assert half[0][0].dtype == torch.bfloat16
    for (k, v), (k_half, v_half) in zip(exact, half, strict=True):
        assert float((k - k_half.float()).norm() / k.norm()) < 0.03 and float((v - v_half.float()).norm() / v.norm()) < 0.03
    padded = torch.cat([ids, torch.full((2, 5), -100)], 1)
    for (k, _), (k_padded, _) in zip(exact, KVExtractor(load_teacher(teachers / "llama"))(padded), strict=True):
        assert torch.allclose(k, k_padded[:, :16], atol=1e-5) and not k_padded[:, 16:].any()


def test_what_is_saved_is_what_was_trained(whole):
    projector = KVDimensionProjector.load(whole.path / "projector" / "projector.safetensors")
    stored = read_checkpoint(checkpoints(whole.path)[0]).groups["objective"]
    stored = {name.removeprefix("projector."): t for name, t in stored.items() if name.startswith("projector.")}
    assert tensor_hash(projector.state_dict()) == tensor_hash(stored)


SMALL = dict(vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=64, max_position_embeddings=64)
GROUPED = SMALL | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
GPT = dict(vocab_size=300, n_embd=48, n_layer=3, n_head=6, n_positions=64, bos_token_id=0, eos_token_id=0)
FALCON = dict(vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
OPT = FALCON | dict(ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=48)
WINDOWS = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
MOST = (8, "halves", 1e4)
FAMILIES = {  # configuration; of 8 channels how many turn, where those of a pair stand, and the base, of each kind of layer
    "llama": (LlamaConfig(**GROUPED), *MOST), "qwen2": (Qwen2Config(**GROUPED), *MOST),
    "qwen3": (tf.Qwen3Config(**GROUPED, head_dim=8), *MOST),
    "granite": (tf.GraniteConfig(**GROUPED, attention_multiplier=0.3, embedding_multiplier=4.0, residual_multiplier=0.5), *MOST),
    "olmo": (tf.OlmoConfig(**GROUPED, clip_qkv=0.7), *MOST), "olmo2": (tf.Olmo2Config(**GROUPED), *MOST),
    "stablelm": (tf.StableLmConfig(**GROUPED, qk_layernorm=True), 2, "halves", 1e4),
    "gemma3": (tf.Gemma3TextConfig(**GROUPED, head_dim=8, **WINDOWS), 8, "halves", {"sliding_attention": 1e4, "full_attention": 1e6}),
    "cohere": (tf.CohereConfig(**GROUPED, use_qk_norm=True), 8, "pairs", 5e5),
    "cohere2": (tf.Cohere2Config(**GROUPED, **WINDOWS), 8, "pairs", {"sliding_attention": 1e4, "full_attention": None}),
    "phi": (tf.PhiConfig(**GROUPED, qk_layernorm=True), 4, "halves", 1e4), "phi3": (tf.Phi3Config(**GROUPED), *MOST),
    "neox": (tf.GPTNeoXConfig(**SMALL, rotary_pct=0.5), 4, "halves", 1e4), "glm": (tf.GlmConfig(**GROUPED, head_dim=8), 4, "pairs", 1e4),
    "gptj": (tf.GPTJConfig(**GPT, rotary_dim=4), 4, "pairs", 1e4), "gpt2": (tf.GPT2Config(**GPT), 8, "halves", None),
    "bloom": (tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=3, n_head=6), 8, "halves", None),
    "opt": (tf.OPTConfig(**OPT), 8, "halves", None), "falcon": (tf.FalconConfig(**FALCON), *MOST),
    "falcon-40b": (tf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True), *MOST),
    "persimmon": (tf.PersimmonConfig(**SMALL, qk_layernorm=True), 4, "halves", 1e4),
    "hunyuan": (tf.HunYuanDenseV1Config(**GROUPED, head_dim=8), *MOST)}
MISREAD = {"stablelm", "phi", "gemma3", "hunyuan"}  # by hooks on what is called k_norm, or else k_proj: other keys, or heads for times


def family(config) -> tf.PreTrainedModel:
    "A model whose every weight is random, those of norms and biases too."
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5) if name.endswith("weight") else p.normal_(std=0.3)
            else:
                p.normal_(std=1.0 if p is model.get_input_embeddings().weight else p.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def undone(model: tf.PreTrainedModel, name: str, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    "Keys and values of the model's cache, the keys divided by the complex numbers that turned them."
    config, size, pairs, bases = FAMILIES[name]
    layers, found = model(rows, past_key_values=tf.DynamicCache(), use_cache=True).past_key_values.layers, []
    for i, layer in enumerate(layers):
        k, v = layer.keys.double(), layer.values
        if name == "falcon-40b":  # which keeps each head as often as queries use it
            k, v = k[:, ::3], v[:, ::3]
        if base := bases[config.layer_types[i]] if isinstance(bases, dict) else bases:
            turn = torch.arange(k.shape[2])[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
            real, imag = (k[..., : size // 2], k[..., size // 2 : size]) if pairs == "halves" else (k[..., :size:2], k[..., 1:size:2])
            z = torch.complex(real, imag) / torch.polar(torch.ones_like(turn), turn)
            both = torch.cat([z.real, z.imag], -1) if pairs == "halves" else torch.stack([z.real, z.imag], -1).flatten(-2)
            k = torch.cat([both, k[..., size:]], -1)
        found.append((merge_heads(k.float()), merge_heads(v)))
    return found


@torch.no_grad()
def by_name(model: nn.Module, rows: Tensor) -> list[Tensor]:
    "What hooks on `k_norm`, or else `k_proj`, give as (B, T, W); none where no module has these names."
    modules, found = dict(model.named_modules()), []
    names = [name for name in modules if name.endswith(".k_proj")]
    for name in names:
        norm = name.removesuffix("k_proj") + "k_norm"
        modules[norm if norm in modules else name].register_forward_hook(lambda m, taken, given: found.append(given.flatten(2)))
    model(rows)
    return found


def farthest(read: list[Tensor], wanted: list[Tensor]) -> float:
    return max(relative_distance(a, b) if a.shape == b.shape else 1.0 for a, b in zip(read, wanted, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_those_of_the_models_own_cache(name, tmp_path):
    rows = torch.randint(1, 300, (2, 19), generator=torch.Generator().manual_seed(3))
    family(FAMILIES[name][0]).save_pretrained(tmp_path / name)
    teacher = load_teacher(tmp_path / name)
    wanted = undone(teacher.model, name, rows)
    padded = [[x[:, :19] for x in pair] for pair in KVExtractor(teacher)(torch.cat([rows, torch.full((2, 4), -100)], 1))]
    kept = extract(teacher, token_rows(rows), tmp_path / "kv", precision="fp32").read([0, 1])
    for read in (KVExtractor(teacher)(rows), padded, kept):
        for role in (0, 1):
            assert farthest([pair[role] for pair in read], [pair[role] for pair in wanted]) < 1e-5
    if naive := by_name(teacher.model, rows):
        assert (farthest(naive, [k for k, _ in wanted]) > 0.3) == (name in MISREAD)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["stablelm", "neox", "gpt2"])
def test_keys_in_half_precision(name, precision, tmp_path):
    rows = torch.randint(1, 300, (2, 19), generator=torch.Generator().manual_seed(3))
    family(FAMILIES[name][0]).save_pretrained(tmp_path / name)
    exact, half = (KVExtractor(load_teacher(tmp_path / name, p)) for p in ("fp32", precision))
    assert str(half.way) == str(exact.way)
    assert farthest([k for k, _ in half(rows)], [k for k, _ in exact(rows)]) < 0.05


def test_keys_that_no_way_reads_are_refused_with_both_numbers():
    model = family(FAMILIES["gptj"][0])
    heads = model.transformer.h[1].attn._split_heads
    model.transformer.h[1].attn._split_heads = lambda x, *args: 3 * heads(x, *args)
    with pytest.raises(RunError, match=r"hooks are off by 0\.\d+ from its own cache, and its cache turned back is off by inf"):
        KVExtractor(as_teacher(model))
    convolves = tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"])
    with pytest.raises(RunError, match="without keys and values of every layer"):
        KVExtractor(as_teacher(family(convolves)))
