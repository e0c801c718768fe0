"""Several calibrating methods on one layer: scores first, then probabilities, each on what the one before left."""

import pytest
import torch
from miniatures import BOS
from test_act import HEADS, LOW, PARTS, attention, call, draw, published
from test_image_shift import written_out
from test_var import DIMS, PLANTED, planted, prompt  # noqa: F401  (a fixture)

import infer_patch
from infer_patch import attend
from infer_patch.errors import UnsupportedCallError
from infer_patch.kernels.image_shift import ImageRule
from infer_patch.patches import ACT, VAR, Paint, RetrievalHeads

LAYER = 2
RULE = ImageRule(0.5, 0.05, 0.4)
VISUAL_SINKS = VAR(dims=DIMS, vision_mass_min=0.05, layers=(LAYER,))
COLUMNS = ACT(heads=((LAYER, 0), (LAYER, 1), (LAYER, 3)), threshold=1.5, threshold_mode="relative", beta=0.3)
PATCHES = Paint(alpha=0.9, beta=0.5, layers=(LAYER,))
MASKED = RetrievalHeads(heads=(f"{LAYER}-1",))
PLANS = [
    (VISUAL_SINKS, COLUMNS),
    (PATCHES, VISUAL_SINKS),
    (PATCHES, COLUMNS),
    (MASKED, COLUMNS),
    (COLUMNS, MASKED, VISUAL_SINKS, PATCHES),
    (RetrievalHeads(heads=(f"{LAYER}-1",), mode="zero", phase="all"), VISUAL_SINKS, COLUMNS),
]


def by_definition(z, new_rows, gains, visual, sinks, methods):
    """The whole chain in double, on the scores [H, T, T] of all rows so far, of which calls brought `new_rows`."""
    names = {method.name: method for method in methods}
    rows = z.shape[1]
    z, seen = z.double(), torch.ones(rows, rows, dtype=torch.bool).tril()
    asks = [sum(new_rows[: i + 1]) - 1 for i in range(len(new_rows))]  # the last row of every call
    if "paint" in names:
        z[:, asks] += gains * z[:, asks].abs()
    a = z.masked_fill(~seen, float("-inf")).softmax(-1)
    if "retrieval_heads" in names:
        hit = range(rows) if names["retrieval_heads"].phase == "all" else asks
        for row in hit:
            a[1, row] = seen[row] / (row + 1) if names["retrieval_heads"].mode == "uniform" else 0
    if "var" in names:
        behind = torch.arange(rows) > visual.nonzero().max()
        a = written_out(a[None], sinks[None], visual[None], behind[None], RULE)[0][0]
    return a


def calibrated(a, method, since, until):
    """ACT on rows since..until of one head [T, T], by the rows up to `until`."""
    part = a[:until, :until]
    return published(part, method)[0][since:until]


@pytest.mark.parametrize("methods", PLANS, ids=["+".join(m.name for m in plan) for plan in PLANS])
@torch.no_grad()
def test_each_works_on_what_the_one_before_left(methods, planted, monkeypatch):  # noqa: F811
    mini, model = planted
    inputs, seen = prompt(mini), []
    layer = model.model.language_model.layers[LAYER].self_attn
    true = attend.dense_with_lse

    def look(dense, module, q, k, v, mask, kwargs):
        if module is layer:
            seen.append((q[0], k[0], v[0]))
        return true(dense, module, q, k, v, mask, kwargs)

    monkeypatch.setattr(attend, "dense_with_lse", look)
    outputs = []
    hook = layer.o_proj.register_forward_pre_hook(lambda m, args: outputs.append(args[0][0]))
    with infer_patch.patch(model, methods) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        for token in (20, 21):
            model(torch.tensor([[token]]), past_key_values=cache)
        figures = handle.report().methods
    hook.remove()
    assert all(figures[method.name]["fired"] for method in methods)

    q, (k, v) = torch.cat([x[0] for x in seen], 1), seen[-1][1:]
    group = q.shape[0] // k.shape[0]
    z = q.double() @ k.double().repeat_interleave(group, 0).transpose(-1, -2) * layer.scaling
    ids = torch.cat([inputs["input_ids"][0], torch.tensor([20, 21])])
    visual, sinks, count = ids == mini.image_token_id, ids == BOS, len(ids)
    sinks[visual.nonzero()[list(PLANTED), 0]] = True
    kept = cache.layers[LAYER].memory[0].get("gains of visual tokens", torch.zeros(0))
    gains = torch.cat([kept, torch.zeros(count - len(kept))]).double()
    calls = [count - 2, 1, 1]
    edited = by_definition(z, calls, gains, visual, sinks, methods)
    act = next((method for method in methods if method.name == "act"), None)
    wide, since = v.double().repeat_interleave(group, 0), 0
    for rows, output in zip(calls, outputs):
        until = since + rows
        expected = edited[:, since:until].clone()
        for head in (0, 1, 3) if act else ():
            expected[head, :, :until] = calibrated(edited[head], act, since, until)
        found = output.view(rows, q.shape[0], -1).transpose(0, 1).double()
        torch.testing.assert_close(found, expected @ wide, atol=2e-5, rtol=1e-4)
        since = until


def halved(columns):
    """An edit by some method before: these columns lose half to the others."""

    def edit(a, z, heads, rows):
        kept = a.clone()
        kept[..., columns] *= 0.5
        return kept / kept.sum(-1, keepdim=True)

    return edit


@pytest.mark.parametrize("decode", ["running", "frozen"])
def test_edited_rows_can_be_taken_back(decode):
    method, (q, k, v) = ACT(**LOW, decode=decode), draw(60)
    runtime, edit = method.runtime(PARTS, (0,)), halved([1, 5])

    def correct(memory, rows, until):
        this = call(q, k, v, rows, memory, until)
        this.edits.append(edit)
        a = edit(attention(this.q, this.k), None, (), slice(until - rows, until))
        return runtime.calibrate(0, this, (a @ this.v.double().repeat_interleave(3, 1)).float())

    straight, back = [{}, {}], [{}, {}]
    for rows, until in ((40, 40), (5, 45), (1, 46)):
        correct(straight, rows, until)
    for rows, until in ((40, 40), (8, 48), (1, 49), (2, 44), (2, 46)):  # after 49 tokens, 7 are taken back
        if until == 44:
            assert back[0][runtime.key].rows == 49
        correct(back, rows, until)
    torch.testing.assert_close(correct(back, 4, 50), correct(straight, 4, 50), atol=1e-5, rtol=1e-4)
    if decode == "running":
        with pytest.raises(UnsupportedCallError, match=r"43 tokens were taken back .* the newest \d+ rows only"):
            correct(back, 1, 8)


def test_heads_that_are_not_calibrated_keep_what_others_did():
    """ACT's heads are written from the edited rows; the other heads pass through."""
    method, (q, k, v) = ACT(**LOW), draw(40)
    this = call(q, k, v, 40, [{}, {}])
    this.edits.append(halved([0]))
    plain = torch.randn(2, HEADS, 40, 16, generator=torch.Generator().manual_seed(0))
    found = method.runtime(PARTS, (0,)).calibrate(0, this, plain)
    assert torch.equal(found[:, [1, 3, 5]], plain[:, [1, 3, 5]]) and not torch.equal(found, plain)
