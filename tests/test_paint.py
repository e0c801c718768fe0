"""PAINT: which tokens, by how much, in which row; against a plain recomputation with eager attention."""

import numpy as np
import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, vision_inputs
from vision_references import tower_attentions

import infer_patch
from infer_patch.errors import ConflictError, PlanError, UnsupportedModelError
from infer_patch.patches import Envelope, Paint
from infer_patch.patches.paint import boosted_row, informed_tokens


def plain_sets(first, penultimate, ratio):
    """The authors' rule in NumPy: top share of one, as many of the other as are above Tukey's fence."""
    lower, upper = np.percentile(penultimate, [25, 75])
    count = int((penultimate > upper + 1.5 * (upper - lower)).sum())
    summary = set(np.argsort(-penultimate, kind="stable")[:count].tolist())
    local = set(np.argsort(-first, kind="stable")[: int(ratio * len(first))].tolist())
    return local - summary, summary


@pytest.mark.parametrize("n, ratio", [(576, 0.25), (16, 0.25), (17, 0.1), (9, 0.0), (9, 1.0)])
def test_sets_are_the_authors(n, ratio):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        first, penultimate = rng.random(n), rng.exponential(size=n) ** 3
        found = informed_tokens(torch.tensor(first), torch.tensor(penultimate), ratio)
        assert [set(x.nonzero()[:, 0].tolist()) for x in found] == list(plain_sets(first, penultimate, ratio))
        assert not (found[0] & found[1]).any()


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
    if mini.name == "internvl":
        rows = [attentions[b].mean(1)[:, 0, 1:].view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) for b in (0, 1)]
    else:
        rows = [attentions[b].mean(1)[:, 0, 1:] for b in (0, 1)]  # three blocks: the first, the last but one
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(extra)], dtype=torch.long)], 1)
    visual, prompt, n = (ids[0] == IMAGE).nonzero()[:, 0].tolist(), inputs["input_ids"].shape[1], ids.shape[1]
    gains = torch.zeros(n)
    for picture in range(len(rows[0])):
        local, summary = plain_sets(rows[0][picture].numpy(), rows[1][picture].numpy(), method.local_ratio)
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


@pytest.mark.parametrize("options", [{}, {"layers": (0, 3), "alpha": 0.2, "beta": 1.5}, {"boost_prefill": False}])
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
    for options in ({"alpha": -1.0}, {"beta": float("nan")}, {"local_ratio": 1.5}):
        with pytest.raises(PlanError, match=f"paint: {next(iter(options))} must be"):
            Paint(**options)
