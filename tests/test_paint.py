"""PAINT: which tokens, by how much, in which row; against a plain recomputation with eager attention."""

import numpy as np
import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, vision_inputs
from vision_references import tower_attentions

import infer_patch
from infer_patch.errors import ConflictError, PlanError, UnsupportedModelError
from infer_patch.patches import Envelope, Paint
from infer_patch.patches.paint import _Paint, boosted_row, informed_tokens


def plain_sets(first, penultimate, ratio, received=(), spatial_ratio=0.0):
    """The authors' rule in NumPy: top share of one, as many of the other as are above Tukey's fence.

    And our reading of their spatial picks: the top share of the attention received from patches.
    """
    lower, upper = np.percentile(penultimate, [25, 75])
    count = int((penultimate > upper + 1.5 * (upper - lower)).sum())
    summary = set(np.argsort(-penultimate, kind="stable")[:count].tolist())
    local = set(np.argsort(-first, kind="stable")[: int(ratio * len(first))].tolist())
    spatial = set(np.argsort(-np.asarray(received), kind="stable")[: int(spatial_ratio * len(first))].tolist())
    return (local | spatial) - summary, summary


@pytest.mark.parametrize("n, ratio", [(576, 0.25), (16, 0.25), (17, 0.1), (9, 0.0), (9, 1.0)])
def test_sets_are_the_authors(n, ratio):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        first, penultimate = rng.random(n), rng.exponential(size=n) ** 3
        found = informed_tokens(torch.tensor(first), torch.tensor(penultimate), ratio)
        assert [set(x.nonzero()[:, 0].tolist()) for x in found] == list(plain_sets(first, penultimate, ratio))
        assert not (found[0] & found[1]).any()


@pytest.mark.parametrize("n, ratio", [(576, 0.05), (16, 0.25), (17, 0.1), (9, 0.0), (9, 1.0)])
def test_spatial_picks_are_local_too(n, ratio):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows = first, penultimate, received = rng.random(n), rng.exponential(size=n) ** 3, rng.random(n)
        u, v, w = map(torch.tensor, rows)
        found = informed_tokens(u, v, 0.25, w, ratio)
        expected = plain_sets(first, penultimate, 0.25, received, ratio)
        assert [set(x.nonzero()[:, 0].tolist()) for x in found] == list(expected)
        before = informed_tokens(u, v, 0.25)
        assert torch.equal(found[1], before[1]) and bool((found[0] >= before[0]).all())
        assert (found[0] != before[0]).any() or int(ratio * n) <= 4


def random_row(seed=0, heads=4, kv=2, keys=11, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, 1, 8, generator=rng).to(dtype)
    k, v = (torch.randn(2, kv, keys, 8, generator=rng).to(dtype) for _ in range(2))
    gains = torch.rand(2, keys, generator=rng) * (torch.rand(2, keys, generator=rng) > 0.5)
    return q, k, v, gains


def test_the_row_is_the_closed_form():
    q, k, v, gains = random_row()
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    z = (q @ keys.transpose(-1, -2)) * 0.3
    plain = z.softmax(-1)
    closed = plain * (gains[:, None, None] * z.abs()).exp()  # A'_j is proportional to A_j exp(g_j |z_j|)
    closed = closed / closed.sum(-1, keepdim=True)
    torch.testing.assert_close(boosted_row(q, k, v, gains, 0.3), closed @ values, atol=1e-5, rtol=1e-5)
    boosted = (gains > 0)[:, None, None].expand_as(z)
    assert ((closed * boosted).sum(-1) >= (plain * boosted).sum(-1) - 1e-6).all()  # their mass never shrinks
    torch.testing.assert_close(boosted_row(q, k, v, 0 * gains, 0.3), plain @ values, atol=1e-5, rtol=1e-5)


def test_keys_with_a_score_of_zero_are_not_raised_and_half_precision_stays_finite():
    q, k, v, gains = random_row()
    k[:, :, 3] = 0
    only = torch.zeros_like(gains)
    only[:, 3] = 100
    torch.testing.assert_close(boosted_row(q, k, v, only, 1.0), boosted_row(q, k, v, 0 * gains, 1.0))
    half = [x.half() for x in (q * 30, k * 30, v)]
    assert boosted_row(*half, gains, 1.0).isfinite().all()


@torch.no_grad()
def recompute(mini, inputs, method, layers, extra):
    """Logits of the last prompt row and of `extra`, by eager attention with the scores of those rows raised."""
    model = mini.build(attn_implementation="eager")
    attentions = tower_attentions(model, inputs)
    # three blocks: the first, the last but one; and what patches of the first receive from each other, in fp64
    received = attentions[0].double()[:, :, 1:, 1:].sum((1, 2))
    rows = [attentions[0].mean(1)[:, 0, 1:], attentions[1].mean(1)[:, 0, 1:], received]
    if mini.name == "internvl":
        rows = [x.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) for x in rows]
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(extra)], dtype=torch.long)], 1)
    visual, prompt, n = (ids[0] == IMAGE).nonzero()[:, 0].tolist(), inputs["input_ids"].shape[1], ids.shape[1]
    gains = torch.zeros(n)
    for picture in range(len(rows[0])):
        first_block, penultimate, received = (x[picture].numpy() for x in rows)
        local, summary = plain_sets(first_block, penultimate, method.local_ratio, received, method.spatial_ratio)
        for chosen, gain in ((local, method.alpha), (summary, method.beta)):
            gains[[visual[picture * 16 + i] for i in chosen]] = gain
    first = prompt - 1 if method.boost_prefill else prompt
    module = __import__(type(model.model.language_model.layers[0].self_attn).__module__, fromlist=["x"])
    original = module.eager_attention_forward

    def raised(attention, q, k, v, mask, scaling, **kwargs):
        if getattr(attention, "layer_idx", None) not in layers:
            return original(attention, q, k, v, mask, scaling=scaling, **kwargs)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        z = q @ k.transpose(-1, -2) * scaling
        z[:, :, first:] += gains * z[:, :, first:].abs()
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        weights = z.masked_fill(~causal, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2), weights

    module.eager_attention_forward = raised
    try:
        call = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return model(**call).logits[0, prompt - 1 :]
    finally:
        module.eager_attention_forward = original


OPTIONS = [{}, {"layers": (0, 3), "alpha": 0.2, "beta": 1.5}, {"boost_prefill": False}, {"spatial_ratio": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family, images", [("llava", 1), ("llava", 2), ("internvl", 1)])
def test_prefill_and_decode_equal_a_recomputation_with_raised_scores(family, images, options):
    mini, method = MINIATURES[family], Paint(**options)
    inputs = vision_inputs(mini, images=(images,), text=[(6, 7)], seed=3)
    with infer_patch.patch(mini.build(), method) as handle:
        out = handle.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        rows = {layer: counts["rows"] for layer, counts in handle.report().methods["paint"]["corrected"].items()}
    layers = options.get("layers", (2, 3))
    steps = 4 if options.get("boost_prefill", True) else 3
    assert rows == dict.fromkeys(layers, steps * 4)  # one row of four heads in every step
    prompt = inputs["input_ids"].shape[1]
    expected = recompute(mini, inputs, method, layers, out.sequences[0, prompt:-1].tolist())
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_the_spatial_ratio_changes_the_sets_and_none_changes_nothing(family, monkeypatch):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0))
    visual, gains = inputs["input_ids"] == IMAGE, {}
    picked, logits = _Paint._picked, {}
    for ratio in (None, 0.0, 0.4):
        monkeypatch.setattr(_Paint, "_picked", lambda *a, r=ratio: gains.setdefault(r, picked(*a)))
        with torch.no_grad(), infer_patch.patch(model, Paint(**({} if ratio is None else {"spatial_ratio": ratio}))):
            logits[ratio] = model(**inputs).logits
    (none, zero, some), (plain, same, other) = gains.values(), logits.values()
    assert torch.equal(plain, same) and torch.equal(none[0], zero[0])
    assert not torch.equal(plain[:2, -1], other[:2, -1]) and torch.equal(plain[2], other[2])
    more = some[0] != none[0]
    assert more.any(1).tolist() == [True, True, False] and (some[0][more] == some[0].new_tensor(0.7)).all()
    assert not (some[0] > 0)[~visual].any()
    if family == "llava_next":
        assert not (some[0] > 0)[0, visual[0].nonzero()[[8, 13], 0]].any()  # newlines


def test_only_the_last_row_changes():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0))
    with torch.no_grad():
        plain = model(**inputs).logits
        with infer_patch.patch(model, Paint(layers=(3,))):
            patched = model(**inputs).logits
    torch.testing.assert_close(patched[:, :-1], plain[:, :-1])
    assert [torch.equal(a, b) for a, b in zip(patched[:, -1], plain[:, -1])] == [False, False, True]


def test_one_prompt_never_sees_the_gains_of_another_and_beams_keep_theirs():
    mini = MINIATURES["llava"]
    model = mini.build()
    one, other = (vision_inputs(mini, images=(1,), seed=seed) for seed in (1, 2))
    both = vision_inputs(mini, images=(1, 2), text=[(5, 9), (3, 12)], seed=1)
    options = {**GREEDY, "num_beams": 3}
    with infer_patch.patch(model, Paint(alpha=2.0)):
        expected = model.generate(**one, **GREEDY)
        model.generate(**other, **GREEDY)
        assert torch.equal(model.generate(**one, **GREEDY), expected)
        batch = model.generate(**both, **options)
        width = both["input_ids"].shape[1]
        for i in range(2):
            alone = vision_inputs(mini, images=(1, 2), text=[(5, 9), (3, 12)], seed=1, only=i)
            assert torch.equal(batch[i, width:], model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :])


def test_what_cannot_be_served_is_refused():
    for family, reason in (("qwen2_vl", "that of qwen2_vl has none"), ("llama", "llama has none")):
        with pytest.raises(UnsupportedModelError, match=reason):
            infer_patch.patch(MINIATURES[family].build(), Paint())
    with pytest.raises(UnsupportedModelError, match="Give `layers`"):
        infer_patch.patch(MINIATURES["llava"].build(num_hidden_layers=2), Paint())
    with pytest.raises(ConflictError):
        infer_patch.patch(MINIATURES["llava"].build(), [Paint(), Envelope()])
    for options in ({"alpha": -1.0}, {"beta": float("nan")}, {"local_ratio": 1.5}, {"spatial_ratio": -0.1}):
        with pytest.raises(PlanError, match=f"paint: {next(iter(options))} must be"):
            Paint(**options)
