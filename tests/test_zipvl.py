"""ZipVL: the budget, the membership, attention among important tokens only, and what the cache keeps of the others."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import MINIATURES, text_inputs

import infer_patch
from infer_patch.errors import ConflictError, PlanError, UnsupportedModelError
from infer_patch.kernels.subset_attention import TokenSubset, reference, subset_attention
from infer_patch.kv_policy import probe_rows
from infer_patch.patches import Envelope, ZipVL
from infer_patch.patches.zipvl import MassPolicy, budget, important_tokens, normalised_score

LLAMA = MINIATURES["llama"]
SMALL = dict(tau=0.7, dense_below=64, recent=16, window=32, group=32, recent_probes=16, random_probes=16)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prefilled(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, use_cache=True, **options)


# --- formulas ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80), st.floats(0.01, 0.999))
def test_the_budget_is_the_fewest_tokens_that_hold_tau(seed, n, tau):
    mass = random(seed, n).exp()
    p = int(budget(mass, tau))
    held = mass.double().sort(descending=True).values.cumsum(0)
    assert 1 <= p <= n
    assert held[p - 1] >= tau * held[-1] * (1 - 1e-12)
    assert p == 1 or held[p - 2] < tau * held[-1]


def test_the_budget_grows_with_tau_and_follows_concentration():
    mass = random(0, 400).exp()
    grid = [int(budget(mass, tau / 100)) for tau in range(1, 101)]
    assert grid == sorted(grid) and grid[-1] == 400
    assert int(budget(torch.eye(50)[3] + 1e-6, 0.975)) == 1
    assert int(budget(torch.ones(1000), 0.975)) == 975
    assert budget(torch.zeros(2, 9), 1.0).tolist() == [9, 9]
    assert budget(torch.stack([torch.eye(9)[2], torch.ones(9)]), 0.5).tolist() == [1, 5]  # each row for itself


def test_the_budget_comes_from_the_mass_and_the_membership_from_the_score():
    mass, seen = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([8, 4, 2, 1])
    score = normalised_score(mass, seen)
    assert score.tolist() == [0.5, 0.75, 1.0, 1.0]
    assert important_tokens(mass, score, 0.7).tolist() == [False, False, True, True]  # two tokens hold 0.7 of the mass
    assert important_tokens(mass, mass, 0.7).tolist() == [
        True,
        True,
        False,
        False,
    ]  # merging the steps would choose these
    released = normalised_score(mass, seen, "released")
    torch.testing.assert_close(released, torch.tensor([1.0, 1.0, 1.0, 1.0]))


def test_forced_tokens_are_in_and_may_raise_the_count():
    mass = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    forced = torch.tensor([[False, False, True, True]])
    assert important_tokens(mass, mass, 0.5, forced).tolist() == [[False, False, True, True]]
    assert important_tokens(mass, mass, 0.9, forced).tolist() == [[True, False, True, True]]
    assert important_tokens(mass, mass, 1.0, forced).all()


def test_a_window_is_judged_by_the_mass_inside_it():
    """Against a whole row's mass a window of the cache would hardly ever reach tau, and everything would stay."""
    mass = torch.full((2, 64), 1e-5)
    mass[:, :8] = 1e-3
    chosen = MassPolicy(bits=4, other_bits=2, important=0.5, tau=0.9).choose(mass, torch.ones(64, dtype=torch.long))
    assert chosen.shape == (1, 64) and chosen[0, :8].all() and 8 <= int(chosen.sum()) < 16


def test_probes_are_drawn_once_for_all_layers():
    assert torch.equal(probe_rows(500, 64, 64, 0), probe_rows(500, 64, 64, 0))
    rows = probe_rows(500, 64, 64, 0)
    assert rows.shape == (128,) and rows[-64:].tolist() == list(range(436, 500)) and len(set(rows.tolist())) == 128
    assert probe_rows(1, 64, 64, 0).tolist() == [0]


# --- attention among some tokens ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.booleans())
def test_gathered_attention_equals_a_dense_run_masked(seed, n, others_attend):
    q, k, v = random(seed, 2, 4, n, 16), random(seed + 1, 2, 2, n, 16), random(seed + 2, 2, 2, n, 16)
    keep = random(seed + 3, 2, n) > 0
    keep[:, 0] = keep[:, -1] = True
    subset = TokenSubset(keep, others_attend, tuple(keep.sum(1).tolist()))
    out = subset_attention(q, k, v, subset, 0.3)
    torch.testing.assert_close(out, reference(q, k, v, subset, 0.3), atol=1e-5, rtol=1e-4)
    skipped = out.transpose(1, 2)[~keep]
    assert (skipped.abs().sum(-1) > 0).all() if others_attend else (skipped == 0).all()


def test_the_saving_of_a_share_is_its_square():
    n = 64 * 4000
    keep = torch.zeros(1, n, dtype=torch.bool)
    keep[:, : round(0.421 * n)] = True
    read = TokenSubset(keep, False, (round(0.421 * n),)).blocks_read(1, 1)
    whole = TokenSubset(torch.ones_like(keep), False, (n,)).blocks_read(1, 1)
    assert 1 - read / whole == pytest.approx(0.823, abs=0.001)  # the paper's figure for r = 42.1 %


@torch.no_grad()
def first_layer(model, inputs):
    """Queries, keys and values of layer 0, after rotary embedding [1, H, n, D]."""
    seen = {}

    def look(module, q, k, v, mask, **kwargs):
        seen.setdefault("qkv", (q, k, v))
        return original(module, q, k, v, mask, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    original = functions["sdpa"]
    functions["sdpa"] = look
    try:
        model(**inputs)
    finally:
        functions["sdpa"] = original
    return seen["qkv"]


def test_the_layer_computes_what_the_formulas_say():
    """The first layer's attention output, recomputed with whole matrices from the model's own queries and keys."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    q, k, v = first_layer(model, inputs)
    n, scale = 300, q.shape[-1] ** -0.5
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows = probe_rows(n, 16, 16, 0)
    hidden = torch.arange(n) > rows[:, None]
    mass = (q[:, :, rows] @ keys.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1).mean(1).sum(1)  # [1, n]
    assert float(mass.sum()) == pytest.approx(32, rel=1e-4)  # as many as probes
    seen = torch.tensor([[int((rows >= j).sum()) for j in range(n)]])
    forced = (torch.arange(n) < 4) | (torch.arange(n) >= n - 16)
    keep = important_tokens(mass, mass / seen, 0.7, forced[None])
    expected = reference(q, k, v, TokenSubset(keep, False, ()), scale)[0]  # [H, n, D]

    found = {}
    attention = model.model.layers[0].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda m, args: found.update(x=args[0]))
    with torch.no_grad(), infer_patch.patch(model, ZipVL(**SMALL)) as handle:
        model(**inputs)
        figures = handle.report().methods["zipvl"]
    hook.remove()
    out = found["x"].view(n, q.shape[1], -1).transpose(0, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert keep[0, -1] and (out[:, ~keep[0]] == 0).all()
    assert figures["tokens_attending"][0] == round(float(keep.sum()) / n, 4) < 0.9
    assert "of the prompt took part in attention" in str(handle.report())


# --- the cache ---------------------------------------------------------------------------------------------


def kept_numbers(cache, layer, sample):
    """Token numbers in the two pools of a layer."""
    pools = []
    for pool in cache.layers[layer].pools:
        numbers = []
        for slab in pool.slabs.values():
            if slab.used[sample]:
                held = slab.numbers()[sample, 0, : slab.used[sample]]
                valid = slab.data.valid[sample, 0, : slab.used[sample]]
                numbers += held[torch.arange(slab.size) < valid[:, None]].tolist()
        pools.append(sorted(numbers))
    return pools


def test_important_tokens_take_more_bits_and_nothing_is_lost():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300, 210), seed=1)
    with infer_patch.patch(model, ZipVL(**SMALL)) as handle:
        cache = prefilled(model, inputs).past_key_values
        held = handle.report().methods["zipvl"]["bytes_by_precision"]
    assert set(held) == {"4 bits", "2 bits", "float32"}
    sizes = set()
    for layer in range(LLAMA.num_layers):
        for sample, length in enumerate((300, 210)):
            packed = (length - 20) // 32 * 32
            high, low = kept_numbers(cache, layer, sample)
            assert sorted(high + low) == list(range(4, 4 + packed))
            sizes.add(len(high))
    assert len(sizes) > 2  # budgets of layers and samples differ


def test_evicted_tokens_are_gone_and_the_logical_length_stays():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300, 210), seed=1)
    method = ZipVL(unimportant="evict", **SMALL)
    with infer_patch.patch(model, ZipVL(**SMALL)):
        kept = prefilled(model, inputs).past_key_values
    with infer_patch.patch(model, method) as handle:
        cache = prefilled(model, inputs).past_key_values
        figures = handle.report().methods["zipvl"]
    assert cache.get_seq_length() == 300
    for sample, length in enumerate((300, 210)):
        important, _ = kept_numbers(kept, 0, sample)
        tail = length - (length - 20) // 32 * 32
        held = cache.layers[0].numbers
        assert held.counts[sample] == len(important) + tail
        numbers = held.logical(torch.device("cpu"))[sample, : held.counts[sample]] - (300 - length)
        assert numbers[4 : 4 + len(important)].tolist() == important
    assert max(figures["rows_held"].values()) < 300
    assert "held at most" in str(handle.report())
    assert sum(layer.nbytes() for layer in cache.layers) < sum(layer.nbytes() for layer in kept.layers)


@pytest.mark.parametrize("unimportant", ["quantise", "evict"])
def test_decoding_judges_one_window_after_another(unimportant):
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(120, 100), seed=1)
    method = ZipVL(unimportant=unimportant, bits=16, other_bits=8, **SMALL)
    with torch.no_grad(), infer_patch.patch(model, method):
        cache = prefilled(model, inputs).past_key_values
        before, mask = cache.layers[0].packed, inputs["attention_mask"]
        seen = []
        for _ in range(70):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            logits = model(input_ids=torch.full((2, 1), 50), attention_mask=mask, past_key_values=cache).logits
            seen.append(tuple(cache.layers[0].packed))
    assert logits.isfinite().all() and cache.get_seq_length() == 190
    packs = [tuple(before), *dict.fromkeys(s for s in seen if s != tuple(before))]
    assert len(packs) > 2
    grown = [b[0] - a[0] for a, b in itertools.pairwise(packs) if b[0] != a[0]]
    assert all(g == 32 for g in grown) if unimportant == "quantise" else all(0 < g <= 32 for g in grown)
    tail = cache.layers[0].tail
    assert all(20 <= rows < 20 + 32 for rows in tail.filled)


def test_a_second_turn_reads_the_packed_cache():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300, 210), seed=1)
    more = text_inputs(LLAMA, lengths=(70, 70), seed=5)["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 70, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for unimportant in ("quantise", "evict"):
        with torch.no_grad(), infer_patch.patch(model, ZipVL(unimportant=unimportant, **SMALL)) as handle:
            both = prefilled(model, inputs, position_ids=places[:, :300]).past_key_values
            later = dict(attention_mask=mask, position_ids=places[:, 300:])
            out = model(input_ids=more, past_key_values=both, **later).logits
            alone = text_inputs(LLAMA, lengths=(300, 210), seed=1, only=1)
            one = prefilled(model, alone).past_key_values
            single = model(input_ids=more[1:], attention_mask=mask[1:, 90:], past_key_values=one).logits
            reasons = handle.report().methods["zipvl"]["dense_calls"]
        torch.testing.assert_close(out[1:], single, atol=1e-4, rtol=1e-4)
        assert (
            reasons["tokens came before this call"] == 3 * LLAMA.num_layers
        )  # samples that are padded differently are asked apart


def test_without_a_cache_prefill_is_as_sparse():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    with torch.no_grad(), infer_patch.patch(model, ZipVL(**SMALL)):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, prefilled(model, inputs).logits)


def test_tau_one_is_dense_and_sixteen_bits_keep_the_cache():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300, 210), seed=1)
    plain = prefilled(model, inputs)
    with infer_patch.patch(model, ZipVL(tau=1.0, bits=16, other_bits=16, dense_below=0)):
        out = prefilled(model, inputs)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.past_key_values.layers[1].keys, plain.past_key_values.layers[1].keys)
    with infer_patch.patch(model, ZipVL(tau=1.0, bits=8, dense_below=0, window=32)):
        out = prefilled(model, inputs)
    assert torch.equal(out.logits, plain.logits)  # packing comes after the prompt's attention
    assert out.past_key_values.layers[0].packed == [224, 128]


def test_short_prompts_and_even_attention_run_dense():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(100,), seed=1)
    plain = prefilled(model, inputs).logits
    with infer_patch.patch(model, ZipVL(**{**SMALL, "dense_below": 101})) as handle:
        assert torch.equal(prefilled(model, inputs).logits, plain)
        assert "fewer than 101 tokens" in str(handle.report())
    with infer_patch.patch(model, ZipVL(**{**SMALL, "tau": 0.999999})) as handle:
        assert torch.equal(prefilled(model, inputs).logits, plain)
        assert "at least 90% of the tokens are important" in str(handle.report())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_after_visual_pruning_the_survivors_are_judged(name):
    from miniatures import vision_inputs

    mini = MINIATURES[name]
    model = mini.build()
    inputs = vision_inputs(mini, images=(1, 2), text=[(150, 80), (120, 90)], seed=1)
    plan = [infer_patch.patches.FastV(layer=1), ZipVL(**SMALL)]
    with infer_patch.patch(model, plan) as handle:
        cache = prefilled(model, inputs).past_key_values
        report = handle.report()
    assert not report.silent
    assert max(cache.layers[1].numbers.counts) < max(cache.layers[0].numbers.counts)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"tau": 0}, "tau must be above 0, got 0"),
        ({"bits": 5}, r"bits must be one of \[2, 4, 8, 16\], got 5"),
        ({"bits": 2, "other_bits": 4}, "need at least the bits of others"),
        ({"unimportant": "drop"}, "unimportant must be one of quantise, evict, got 'drop'"),
        ({"skipped_rows": "copy"}, "skipped_rows must be one of zero, attend"),
        ({"normaliser": "none"}, "normaliser must be one of probes, released"),
        ({"sinks": 0}, "sinks must be 1 or more"),
        ({"recent": 0}, "recent must be 1 or more"),
        ({"recent_probes": 0}, "recent_probes must be 1 or more"),
        ({"window": 8}, "window must be 16 or more, got 8"),
        ({"group": 40}, "group must be a multiple of 16, got 40"),
        ({"dense_above": 0}, "dense_above must be a share above 0"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        ZipVL(**options)


def test_what_it_does_not_compose_with():
    with pytest.raises(ConflictError, match="zipvl"):
        infer_patch.patch(LLAMA.build(), [ZipVL(), Envelope()])
    with pytest.raises(UnsupportedModelError, match="soft-caps"):
        infer_patch.patch(MINIATURES["gemma2"].build(), ZipVL())
