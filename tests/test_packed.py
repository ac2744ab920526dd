"""Several texts in one row: everything is what it is for each text alone."""

import copy
from dataclasses import replace

import pytest
import torch
from driver import one_thread
from transformers import DynamicCache, StaticCache

from hybrid_nb.config.config import HybridConfig, ModelConfig
from hybrid_nb.model import texts
from hybrid_nb.model.attention import shifted_cache
from hybrid_nb.model.decoder import checkpoint_activations
from hybrid_nb.model.hybrid import HybridCache, make_model
from hybrid_nb.model.llama import to_llama

LIMIT = 24  # positions; rows of several texts are longer
BASE = ModelConfig(d_model=32, n_layer=2, n_head=4, n_kv_head=2, d_ff=48, vocab_size=61, max_seq_len=LIMIT, init_std=0.2)
LLAMA = replace(BASE, ffn="swiglu", norm="rmsnorm")
HYBRID = HybridConfig(n_layer=2, d_model=32, n_head=4, n_kv_head=2, global_heads=2, vocab_size=61, max_seq_len=LIMIT, d_state=8, window=6,
                      first_window=3, gate_rank=4, init_std=0.2, gate_balance=1.0, gate_entropy=1.0)
FROZEN = dict(q="frozen-orthogonal", k="frozen-orthogonal")
SHAPES = {
    "gpt": replace(BASE, position="learned", n_kv_head=4, attn_bias=True, ffn_bias=True),
    "grouped": LLAMA,
    "no positions": replace(BASE, position="none"),
    "frozen, shared": replace(LLAMA, **FROZEN, ortho_shared=True, o="none"),
    "shifted": replace(LLAMA, **FROZEN, qk_rank=2, qk_norm=True, qk_temperature=True, qk_shift=True),
    "experts": replace(LLAMA, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, aux_loss_alpha=1.0, seq_aux=True),
    "hybrid": HYBRID,
    "hybrid, tables": replace(HYBRID, srte_share_across_layers=False, srte_factorized_rank=4),
    "hybrid, sines": replace(HYBRID, srte_encoding="sincos", global_heads=0),
    "hybrid, no SRTE": replace(HYBRID, srte_encoding="none", global_heads=4, d_conv=2),
}
every_shape = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(autouse=True, scope="module")
def alone():
    with one_thread():
        yield


def build(name, dtype=torch.float32, **values):
    torch.manual_seed(0)
    model = make_model(SHAPES[name], **values).to(dtype)
    for part, p in model.named_parameters():
        if ".adapter." in part:
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


class Packing:
    "Rows of texts, with padding anywhere between them and anything in it."

    def __init__(self, seed, rows=3, padded=False):
        g = torch.Generator().manual_seed(seed)

        def draw(low, high):
            return int(torch.randint(low, high, (), generator=g))

        self.texts, lines = [], []
        for b in range(rows):
            line = []  # word, position, whether it is real
            for _ in range(draw(1, 6)):
                line += [(draw(0, 61), draw(-9, 99), 0) for _ in range(draw(0, 4) if padded else 0)]
                length = draw(1, 15)
                first = draw(0, 2) * draw(0, LIMIT - length)  # a text may begin at any position
                first = 0 if line and line[-1][2] and first == line[-1][1] + 1 else first
                self.texts.append((b, len(line), length, first))
                line += [(draw(0, 61), first + t, 1) for t in range(length)]
            lines.append(line)
        width = max(map(len, lines))
        for b, line in enumerate(lines):
            left = draw(0, width - len(line) + 1) if padded else width - len(line)
            self.texts = [(row, at + left * (row == b), length, first) for row, at, length, first in self.texts]
            line[:] = [(0, 0, 0)] * left + line + [(0, 0, 0)] * (width - len(line) - left)
        self.ids, self.positions, keep = torch.tensor(lines).unbind(-1)
        self.keep = keep.bool()
        self.mask = None if keep.all() else keep

    def alone(self):
        for b, at, length, first in self.texts:
            yield b, slice(at, at + length), self.ids[b : b + 1, at : at + length], torch.arange(first, first + length)[None]


def packings(n=4):
    for seed in range(n):
        yield Packing(seed, rows=1 + seed % 3, padded=seed % 2 == 1)
        one = Packing(100 + seed, rows=1)
        yield one
        one.mask = torch.ones_like(one.ids)
        yield one


def same(got, want, eps=3e-5):
    far = float((got - want).detach().abs().max())
    assert far <= eps * max(1.0, float(want.detach().abs().max())), far


def ignore_boundaries(monkeypatch):
    "As if each row were one text."

    def one_text(position_BS, keep_BS=None):
        real = torch.ones_like(position_BS, dtype=torch.bool) if keep_BS is None else keep_BS
        return real & (real.long().cumsum(1) == 1)

    monkeypatch.setattr(texts, "text_starts", one_text)


@torch.no_grad()
def logits_differ(model, pack, **how):
    "The largest difference of a logit from the text alone."
    out = model(pack.ids, attention_mask=pack.mask, position_ids=pack.positions, **how).logits
    return max(float((out[b, where] - model(ids, position_ids=at, use_cache=False).logits[0]).abs().max())
               for b, where, ids, at in pack.alone())


@every_shape
def test_logits(name, monkeypatch):
    model = build(name)
    eager = build(name, attn_implementation="eager")
    for pack in packings():
        assert logits_differ(model, pack, use_cache=False) < 3e-5
        assert logits_differ(model, pack) < 3e-5
        assert logits_differ(eager, pack) < 3e-5
    ignore_boundaries(monkeypatch)
    assert logits_differ(model, Packing(0), use_cache=False) > 1e-2


@every_shape
def test_double_precision(name):
    model = build(name, torch.float64)
    assert max(logits_differ(model, pack, use_cache=False) for pack in packings(3)) < 1e-12


@torch.no_grad()
def in_pieces(model, pack, cuts, cache):
    out, ends = [], [0, *cuts, pack.ids.shape[1]]
    for i, j in zip(ends, ends[1:], strict=False):
        mask = None if pack.mask is None else pack.mask[:, :j]
        out.append(model(pack.ids[:, i:j], attention_mask=mask, position_ids=pack.positions[:, i:j], past_key_values=cache).logits)
    return torch.cat(out, 1)


def fresh_caches(model):
    if isinstance(model.config.shape, HybridConfig):
        return [HybridCache(model.shape)]
    if model.config.qk_shift:
        return [shifted_cache(model.config.shape)]
    return [DynamicCache(), DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=120)]


@every_shape
def test_pieces(name):
    model = build(name)
    for seed, pack in enumerate(packings(3)):
        T = pack.ids.shape[1]
        g = torch.Generator().manual_seed(seed)
        cuts = [[], list(range(1, T)), sorted(set(torch.randint(1, max(T, 2), (3,), generator=g).tolist()) - {T})][seed % 3]
        want = model(pack.ids, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False).logits
        for cache in fresh_caches(model):
            same(in_pieces(model, pack, cuts, cache)[pack.keep], want[pack.keep])


@every_shape
def test_loss_and_gradients(name, monkeypatch):
    model = build(name).train()

    def gradients(batches, n):
        model.zero_grad()
        loss = 0.0
        for ids, more in batches:
            out = model(ids, labels=ids, num_items_in_batch=n, **more)
            out.loss.backward()
            loss += out.loss.item()
        return torch.tensor(loss), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for pack in packings(3):
        alone = [(ids, dict(position_ids=at)) for *_, ids, at in pack.alone() if ids.shape[1] > 1]
        n = sum(ids.shape[1] - 1 for ids, _ in alone)
        together = [(pack.ids, dict(position_ids=pack.positions, attention_mask=pack.mask))]
        if n:
            for got, want in zip(gradients(together, n), gradients(alone, n), strict=True):
                same(got, want)
    pack = Packing(0)
    alone = [(ids, dict(position_ids=at)) for *_, ids, at in pack.alone()]
    together = [(pack.ids, dict(position_ids=pack.positions, attention_mask=pack.mask))]
    want = gradients(alone, 50)
    ignore_boundaries(monkeypatch)
    got = gradients(together, 50)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(got, want, strict=True))


def shortened(pack, room):
    "Each row's last text ends the row, and has room to go on."
    return all(at + length == pack.ids.shape[1] and first + length + room <= LIMIT
               for b, at, length, first in [next(t for t in reversed(pack.texts) if t[0] == b) for b in range(len(pack.ids))])


@every_shape
def test_generation(name):
    model = build(name)
    packs = [p for seed in range(60) for p in [Packing(seed, rows=1 + seed % 2)] if shortened(p, 6)][:3]
    assert len(packs) == 3 and any(p.mask is not None for p in packs)
    for pack in packs:
        last = {b: (ids, at) for b, _, ids, at in pack.alone()}
        for how in (dict(), dict(use_cache=False), dict(num_beams=3), dict(prefill_chunk_size=5),
                    dict(cache_implementation="static", disable_compile=True)):
            if "cache_implementation" in how and (isinstance(SHAPES[name], HybridConfig) or model.config.qk_shift):
                continue
            how |= dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
            mask = torch.ones_like(pack.ids) if pack.mask is None else pack.mask
            got = model.generate(pack.ids, attention_mask=mask, position_ids=pack.positions, **how)
            for b, (ids, at) in last.items():
                want = model.generate(ids, attention_mask=torch.ones_like(ids), position_ids=at, **how)
                assert torch.equal(got[b, -5:], want[0, -5:]), how


@every_shape
def test_a_cache_goes_on(name):
    "After a packed row: without positions, by `generate`, with its rows in another order or repeated."
    model, pack = build(name), Packing(5, rows=2)
    pack.ids, pack.positions = pack.ids.clone(), pack.positions.clone()
    more = torch.randint(61, (2, 3), generator=torch.Generator().manual_seed(1))
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    last = [ids[0, 7:], ids[1, 3:]]
    alone = [torch.cat([a, b])[None] for a, b in zip(last, more, strict=True)]
    with torch.no_grad():
        cache = model(ids, position_ids=positions, use_cache=True).past_key_values
        for mask in (None, torch.ones(2, 15, dtype=torch.long)):
            got = model(more, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
            for b in range(2):
                same(got[b], model(alone[b]).logits[0, -3:])
        whole = torch.cat([ids, more], 1)
        written = model.generate(whole, past_key_values=copy.deepcopy(cache), max_new_tokens=4, do_sample=False, pad_token_id=0)
        for b in range(2):
            assert torch.equal(written[b, -4:], model.generate(alone[b], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, -4:])
        turned = copy.deepcopy(cache)
        turned.batch_repeat_interleave(2)
        turned.reorder_cache(torch.tensor([3, 1, 0]))
        order = [1, 0, 0]
        got = model(more[order], past_key_values=turned).logits
        for n, b in enumerate(order):
            same(got[n], model(alone[b]).logits[0, -3:])


@pytest.mark.parametrize("name", ["gpt", "grouped", "experts"])
def test_crop(name):
    model, ids = build(name), torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    for removed in (2, 5, 8):
        with torch.no_grad():
            cache = model(ids, position_ids=positions, use_cache=True).past_key_values
            cache.crop(-removed)
            got = model(ids[:, -removed:], past_key_values=cache, position_ids=positions[:, -removed:]).logits
        same(got, model(ids, position_ids=positions).logits[:, -removed:])


@pytest.mark.parametrize("name", ["gpt", "shifted", "experts", "hybrid"])
def test_recomputed_and_compiled(name):
    pack = Packing(0)
    how = dict(position_ids=pack.positions, attention_mask=pack.mask, labels=pack.ids, use_cache=False)
    grads = []
    for kind in ("plain", "recomputed"):
        model = build(name).train()
        if kind == "recomputed":
            checkpoint_activations(model)
        model(pack.ids, **how).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    same(*grads)
    if name in ("gpt", "experts"):
        return  # compiling takes seconds
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    how.pop("labels")
    same(compiled(pack.ids, **how).logits[pack.keep], model(pack.ids, **how).logits[pack.keep])


def test_llama_agrees():
    for name in ("grouped", "frozen, shared"):
        model = build(name)
        llama = to_llama(model).eval()
        for pack in packings(4):
            if pack.mask is None:
                how = dict(position_ids=pack.positions, use_cache=False)
                same(model(pack.ids, **how).logits, llama(pack.ids, **how).logits)


@every_shape
def test_attention_maps(name):
    model, pack = build(name, attn_implementation="eager"), Packing(1, rows=2)
    out = model(pack.ids, attention_mask=pack.mask, position_ids=pack.positions, output_attentions=True, output_hidden_states=True)
    T = pack.ids.shape[1]
    assert [tuple(m.shape) for m in out.attentions] == [(2, 4, T, T)] * 2 and len(out.hidden_states) == 3
    for b, where, *_ in pack.alone():
        for m in out.attentions:
            same(m[b, :, where, where].sum(-1), torch.ones(4, where.stop - where.start))
            assert not m[b, :, where].triu(1 + where.start).any()
    short = model(pack.ids[:, :8], use_cache=True)
    step = model(pack.ids[:, :1], past_key_values=short.past_key_values, output_attentions=True)
    assert {tuple(m.shape) for m in step.attentions} == {(2, 4, 1, 9)}
    same(step.attentions[0].sum(-1), torch.ones(2, 4, 1))
    fast = build(name)
    with pytest.raises(ValueError, match="output_attentions=True with attn_implementation='sdpa': only 'eager'"):
        fast(pack.ids, position_ids=pack.positions, attention_mask=pack.mask, output_attentions=True)


def test_maps_are_llamas():
    model = build("grouped", attn_implementation="eager")
    llama = to_llama(model).eval()
    llama.set_attn_implementation("eager")
    ids = torch.randint(61, (2, 9))
    for ours, theirs in zip(*(m(ids, output_attentions=True).attentions for m in (model, llama)), strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("name", ["grouped", "experts", "hybrid"])
def test_configuration_decides(name):
    ids = torch.randint(1, 61, (2, 9))  # 0 pads
    model = build(name, attn_implementation="eager", output_hidden_states=True, output_attentions=True)
    out = model(ids)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert model(ids, output_hidden_states=False, output_attentions=False).get("hidden_states") is None
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits) and len(as_tuple) == len(out.to_tuple())
    model.config.return_dict = False
    assert isinstance(model(ids, labels=ids), tuple) and model(ids, labels=ids)[0].dim() == 0
    assert not isinstance(model(ids, return_dict=True), tuple)
    base = model.base_model(ids, return_dict=True, output_attentions=False)
    same(base.last_hidden_state @ model.lm_head.weight.T, out.logits)
    assert model.base_model_prefix == "model" and model.base_model is not model and model.base_model(ids)[0].shape == (2, 9, 32)
    written = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(written.sequences[:, :9], ids)
