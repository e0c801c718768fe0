"""MoA: spans by the published rounding rules, plan files of both layouts, rings that equal masked dense attention."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from miniatures import EOS, GREEDY, MINIATURES, text_inputs
from rows import SPANS

import infer_patch
from infer_patch.errors import PlanError, UnsupportedCallError, UnsupportedModelError
from infer_patch.kernels.block_mask import sink_window_blocks
from infer_patch.kernels.block_sparse_attention import token_mask
from infer_patch.patches import MoA
from infer_patch.patches.moa import SpanPlan, read_plan
from infer_patch.ring_cache import RingLayer
from infer_patch.run import LayerInputs, Run
from infer_patch.spans import Horizon, window_blocks
from infer_patch.tokens import Tokens

BLOCK = 64


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


# --- spans and plans -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha, beta, length, slots",
    [
        (0, 1, 4096, 4096),  # all
        (0, 1, 4100, 4160),  # rounded up to whole blocks
        (1024, 0, 4096, 1024),
        (1024.9, 0.0, 4096, 1024),  # cut to whole tokens first
        (1025, 0, 4096, 1088),
        (2048, 0.5, 1500, 1536),  # never more than the text
        (-1024, 0.25, 3000, 128),  # never less than sinks and one block
        (-1024, 0.5, 8192, 3072),
        (0, 0, 100, 128),
    ],
)
def test_slots_of_a_span(alpha, beta, length, slots):
    assert window_blocks(alpha, beta, length) * BLOCK + 64 == slots


def test_lists_are_the_sinks_and_each_heads_own_window():
    windows, queries, keys = [1, 2, 4, 9], 230, 500
    mask = sink_window_blocks(queries, keys, 64, windows)
    mask.check(queries, keys)
    found = token_mask(mask, 4, queries, keys)[0]
    for head, window in enumerate(windows):
        assert torch.equal(found[head], visible(torch.arange(keys - queries, keys), keys, window)), head


def visible(queries, keys, window, oldest=64, sinks=64):
    """The rule, token by token: sinks, and the blocks from `window` - 1 before the query's own."""
    key = torch.arange(keys)
    recent = (key // BLOCK >= (queries // BLOCK)[:, None] - window + 1) & (key >= oldest)
    return ((key < sinks) | recent) & (key <= queries[:, None])


def test_plans_per_query_head_and_per_key_head():
    per_query = SpanPlan.from_dict({"alphas": [[0, 1024, 128, 128]], "betas": [[1, 0, 0, 0.25]]})
    assert per_query.windows(0, 4096, 4) == (63, 15, 1, 17)
    assert per_query.windows(0, 4096, 2) == (63, 17)  # neighbours share a key head
    assert per_query.density(4096) == pytest.approx((64 + 16 + 2 + 18) / 4 / 64)
    assert per_query.density(4096, kv_heads=2) == pytest.approx((64 + 18) / 2 / 64)
    per_kv = SpanPlan.from_dict({"alphas": [[0, 1024]], "betas": [[1, 0]], "per": "kv", "sink": 128, "version": 1})
    assert per_kv.windows(0, 4096, 2) == (62, 14)
    assert SpanPlan.from_dict(per_kv.to_dict()) == per_kv
    per_query.check(1, 4, 2)
    SpanPlan.from_dict({"alphas": [[0, 1024]], "betas": [[1, 0]]}).check(1, 4, 2)  # two heads: those of the keys


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alphas": 3}, "alphas must be a list of numbers for each layer, got 3"),
        ({"alphas": [[0.0] * 4] * 3}, r"alphas have \[4, 4, 4\] heads, betas \[4, 4, 4, 4\]"),
        ({"alphas": [[0.0] * 4] * 3 + [[0.0] * 3]}, r"alphas have \[4, 4, 4, 3\]"),
        ({"betas": [[1.5] * 4] * 4}, "betas are shares of the length, from 0 to 1, got 1.5"),
        ({"betas": [[True] * 4] * 4}, "got True"),
        ({"alphas": [[float("nan")] * 4] * 4}, "alphas are tokens, as finite numbers, got nan"),
        ({"block": 50}, "block must be a multiple of 16 tokens, got 50"),
        ({"sink": 4}, "sink must be a multiple of the block, 64 tokens, got 4"),
        ({"per": "head"}, "per must be 'query' or 'kv', got 'head'"),
        ({"version": 2}, "it has version 2, this release reads version 1"),
        ({"per": "kv"}, "4 layers of 4 key heads; this model has 4 layers of 4 query and 2 key heads"),
        ({"alphas": [[0.0] * 4] * 2, "betas": [[0.0] * 4] * 2}, "holds 2 layers of 4 heads; this model has 4 layers"),
    ],
)
def test_plan_files_that_do_not_fit(change, message, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(json.loads(Path(SPANS).read_text()) | change))
    with pytest.raises(PlanError, match=message) as error:
        infer_patch.patch(MINIATURES["llama"].build(), MoA(plan_file=str(file)))
    assert "plan.json" in str(error.value) and "infer-patch calibrate moa" in str(error.value)


def test_plan_files_that_are_none(tmp_path):
    (tmp_path / "text.json").write_text("no plan")
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("absent.json", "cannot read the plan file"),
        ("text.json", "is not valid JSON"),
        ("list.json", "expected an object with `alphas` and `betas`, got"),
    ):
        with pytest.raises(PlanError, match=message):
            read_plan(tmp_path / name)
    with pytest.raises(PlanError, match="plan_file must name a JSON file, got ''"):
        MoA()
    with pytest.raises(PlanError, match="length must be 1 or more tokens, got 0"):
        MoA(plan_file=SPANS, length=0)
    with pytest.raises(UnsupportedModelError, match="soft-caps"):
        infer_patch.patch(MINIATURES["gemma2"].build(), MoA(plan_file=SPANS))


def test_the_density_that_key_heads_cost_is_said():
    with pytest.warns(UserWarning, match=r"raises the mean density at 8,192 tokens from 0\.\d\d to 0\.\d\d"):
        infer_patch.patch(MINIATURES["llama"].build(), MoA(plan_file=SPANS)).remove()


def test_n_is_prompt_plus_new_tokens_until_the_text_outgrows_it():
    horizon, notes = Horizon(new_tokens=100), {}
    assert [horizon.of(notes, total, total - 30) for total in (300, 301, 350, 400)] == [370] * 4
    assert horizon.of(notes, 400, 400) == 400  # the sample that has no padding
    assert [horizon.of(notes, total, total - 30) for total in (401, 402, 380)] == [471] * 3
    assert Horizon(length=512).of({}, 9000, 9000) == 512


# --- rings -----------------------------------------------------------------------------------------------


class Simulation:
    """One layer, as the engine drives it, beside dense attention over everything with the rule written out."""

    def __init__(self, rules, lengths, horizon, dim=8, group=2, seed=0):
        self.rules, self.horizon, self.group, self.dim = rules, horizon, group, dim
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = RingLayer(self.windows, horizon)
        self.total = 0
        self.starts = [max(lengths) - n for n in lengths]
        self.keys = self.values = torch.empty(len(lengths), len(rules), 0, dim)

    def windows(self, length, kv_heads):
        return tuple(window_blocks(alpha, beta, length) for alpha, beta in self.rules)

    def draw(self, heads, count):
        return torch.randn(len(self.starts), heads, count, self.dim, generator=self.generator)

    def step(self, count):
        """Feed tokens; attention of the layer, or None while the engine would attend."""
        batch, heads = len(self.starts), len(self.rules)
        q, k, v = self.draw(heads * self.group, count), self.draw(heads, count), self.draw(heads, count)
        mask = torch.arange(self.total + count) >= torch.tensor(self.starts)[:, None]
        mask = None if mask.all() else mask
        tokens = Tokens(batch, count, self.total, mask, None, torch.device("cpu"))
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.total += count
        self.layer.expect(tokens, None)
        k, v = self.layer.update(k, v)
        assert self.layer.get_seq_length() == self.total
        self.q = q
        if not self.layer.attends:
            return None
        return self.layer.attention(LayerInputs(Run(tokens, None, False), 0, self.layer.view, q, k, v, 0.3), None)

    def expected(self, windows=None, oldest=64):
        """Output [B, T, H, D] for the queries of the last step; windows of the heads for each sample."""
        out = torch.zeros_like(self.q)
        for b, start in enumerate(self.starts):
            keys = self.total - start
            positions = torch.arange(keys - self.q.shape[2], keys)
            given = windows[b] if windows else self.windows(self.horizon.of(self.layer.notes, self.total, keys), 0)
            for h in range(self.q.shape[1]):
                k, v = (x[b, h // self.group, start:] for x in (self.keys, self.values))
                scores = self.q[b, h] @ k.T * 0.3
                seen = visible(positions, keys, given[h // self.group], oldest)
                out[b, h] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2)

    def agrees(self, count):
        found = self.step(count)
        torch.testing.assert_close(found, self.expected(), atol=1e-5, rtol=1e-5)


RULES = [(128, 0.0), (0, 0.5), (128, 0.0), (0, 1.0)]


@pytest.mark.parametrize("lengths", [(300,), (300, 171, 236)])
def test_rings_equal_masked_dense_attention_token_by_token(lengths):
    sim = Simulation(RULES, lengths, Horizon(new_tokens=400))
    assert sim.step(max(lengths)) is None  # the prompt goes through the select port
    assert [ring.heads for ring in sim.layer.rings] == [[0, 2], [1], [3]]
    for _ in range(150):
        sim.agrees(1)
    for count in (2, 70, 1, 130, 1, 1):  # a second turn, and decoding after it
        sim.agrees(count)


def test_a_prompt_that_overflows_later_and_one_token_at_a_time():
    sim = Simulation([(128, 0.0), (0, 1.0)], (40,), Horizon(length=512))
    assert sim.step(40) is None
    attending = [sim.step(1) is not None for _ in range(170)]
    assert attending == [False] * 153 + [True] * 17  # 64 sinks + 128 slots: the 193rd token makes rings
    for _ in range(400):
        sim.agrees(1)


def test_memory_is_constant():
    sim = Simulation(RULES, (700,), Horizon(length=700))
    sim.step(700)
    sim.step(1)
    slots = [2 * (128 + 64), 384 + 64, 704 + 64]  # of equal heads: the span and one block for rejected drafts
    floats = 2 * sim.dim * sum(slots)
    filled = 2 * sim.dim * (704 + 64 - 701)  # the head that reads everything has room left
    assert sim.layer.nbytes() == 4 * (floats - filled)
    buffers = [ring.keys.data_ptr() for ring in sim.layer.rings]
    for _ in range(130):
        sim.step(1)
    assert sim.layer.nbytes() == 4 * floats
    assert buffers == [ring.keys.data_ptr() for ring in sim.layer.rings]
    assert sim.layer.keys.numel() == 0 and not sim.layer._buffers


def test_beams_and_repeats_follow_their_samples():
    sim = Simulation(RULES, (300, 171), Horizon(new_tokens=200))
    sim.step(300)
    sim.step(1)
    sim.layer.batch_repeat_interleave(2)
    order = torch.tensor([3, 0, 2])
    sim.layer.reorder_cache(order)
    taken = [1, 0, 1]
    sim.starts = [sim.starts[i] for i in taken]
    sim.keys, sim.values = sim.keys[taken], sim.values[taken]
    for count in (1, 1, 5, 1):
        sim.agrees(count)
    sim.layer.batch_select_indices(torch.tensor([2, 1]))
    sim.starts, sim.keys, sim.values = [sim.starts[2], sim.starts[1]], sim.keys[[2, 1]], sim.values[[2, 1]]
    sim.agrees(1)


def test_taking_back_a_draft():
    sim = Simulation(RULES, (320, 200), Horizon(length=640))
    sim.step(320)
    for drafted, rejected in ((20, 20), (1, 1), (40, 3), (64, 64), (5, 0), (65, 65)):
        sim.agrees(drafted)
        if rejected:
            sim.layer.crop(-rejected)
        sim.total -= rejected
        sim.keys, sim.values = sim.keys[:, :, : sim.total], sim.values[:, :, : sim.total]
        assert sim.layer.get_seq_length() == sim.total
        sim.agrees(1)
    with pytest.raises(UnsupportedCallError, match="last 200 tokens cannot be taken back"):
        sim.layer.crop(-200)
    sim.agrees(1)
    sim.layer.activate_past_recording()  # more is kept from here on
    for _ in range(3):
        sim.agrees(100)
    sim.layer.crop(-200)
    sim.total -= 200
    sim.keys, sim.values = sim.keys[:, :, : sim.total], sim.values[:, :, : sim.total]
    sim.agrees(1)
    sim.layer.crop(-sim.total)
    assert sim.layer.get_seq_length() == 0 and not sim.layer.rings


def test_outgrowing_n_makes_rings_grow_and_loses_nothing_that_was_held():
    sim = Simulation([(128, 0.0), (0, 0.5), (0, 1.0)], (400,), Horizon(new_tokens=50))
    sim.step(400)
    window = sim.windows(450, 3)
    for _ in range(50):
        torch.testing.assert_close(sim.step(1), sim.expected([window]), atol=1e-5, rtol=1e-5)
    found = sim.step(300)  # N is 800 now
    assert sim.windows(800, 3) == (1, 6, 12) != window
    expected = sim.expected()
    for head in (0, 1, 4, 5):  # the short span, and the one that covers everything
        torch.testing.assert_close(found[:, :, head], expected[:, :, head], atol=1e-5, rtol=1e-5)
    # the head that reads half lost what N = 450 did not ask for, but for one spare block
    half = sim.expected(oldest=-(-(450 - (window[1] + 1) * 64) // 64) * 64)
    torch.testing.assert_close(found[:, :, 2:4], half[:, :, 2:4], atol=1e-5, rtol=1e-5)


def test_padding_elsewhere_is_refused():
    model, mini = MINIATURES["llama"].build(), MINIATURES["llama"]
    inputs = text_inputs(mini, lengths=(400, 400))
    with infer_patch.patch(model, MoA(plan_file=SPANS, length=320, evict=True)):
        first = model(**inputs)
        mask = torch.ones(2, 410, dtype=torch.long)
        mask[0, 403:405] = 0
        with pytest.raises(UnsupportedCallError, match="padded on the left"):
            model(inputs["input_ids"][:, :10], attention_mask=mask, past_key_values=first.past_key_values)


# --- in a model ------------------------------------------------------------------------------------------


def test_ring_decoding_equals_reading_the_same_blocks_without_a_cache():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(500, 430), seed=3)
    options = {**GREEDY, "max_new_tokens": 24}
    with torch.no_grad():
        with infer_patch.patch(model, MoA(plan_file=SPANS, length=524, dense_below=0)):
            kept = model.generate(**inputs, **options, use_cache=False)
        with infer_patch.patch(model, MoA(plan_file=SPANS, length=524, evict=True)) as handle:
            rings = model.generate(**inputs, **options)
        plain = model.generate(**inputs, **options)
    assert torch.equal(kept, rings) and not torch.equal(kept, plain)
    figures = handle.report().methods["moa"]
    assert figures["sparse_calls"]["decode"] == 23 * 4
    assert figures["rows_held"][0] < figures["tokens_seen"] == 523


def test_a_cache_of_rings_is_refused_without_the_patch():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(400,))
    with torch.no_grad():
        with infer_patch.patch(model, MoA(plan_file=SPANS, length=320, evict=True)):
            cache = model(**inputs).past_key_values
        with pytest.raises(UnsupportedCallError, match="only the patch that made them can read"):
            model(inputs["input_ids"][:, :1], past_key_values=cache)


def test_drafts_over_rings():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(500,))
    options = {**GREEDY, "max_new_tokens": 50}
    with infer_patch.patch(model, MoA(plan_file=SPANS, length=640, evict=True)):
        greedy = model.generate(**inputs, **options)
        ids = torch.cat([greedy[:, 500:540], inputs["input_ids"]], 1)  # some drafts come true
        greedy = model.generate(ids, **options)
        drafted = model.generate(ids, **options, prompt_lookup_num_tokens=20, eos_token_id=EOS)
    assert torch.equal(drafted, greedy)


def test_gradients_through_rings():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(400,))
    with infer_patch.patch(model, MoA(plan_file=SPANS, length=320, evict=True)):
        out = model(**inputs)
        for _ in range(2):
            out = model(inputs["input_ids"][:, :1], past_key_values=out.past_key_values)
        out.logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()
