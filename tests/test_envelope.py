"""Envelope selection: the bound, the budget, needles, and what prefill and decode agree on."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_patch.errors import PlanError
from infer_patch.kernels.block_sparse_attention import token_mask
from infer_patch.kernels.envelope import block_envelope, envelope_scores, score_blocks, select_blocks
from infer_patch.patches import Envelope

OPTIONS = dict(budget=256, sinks=4, window=64)


def qk(seed, queries, keys, heads=6, kv_heads=2, size=32, batch=2):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator)
    return q, torch.randn(batch, kv_heads, keys, size, generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.sampled_from([4, 16, 64]))
def test_the_bound_holds_for_every_key(seed, keys, block):
    q, k = qk(seed, 5, keys, heads=2, batch=1)
    envelope = block_envelope(k, block)
    assert [x.shape for x in envelope] == [(1, 2, -(-keys // block), 32)] * 2
    bound = envelope_scores(q, envelope, slack=1.0).repeat_interleave(block, -1)[..., :keys]
    assert (bound >= q @ k.transpose(-1, -2) - 1e-4).all()


@pytest.mark.parametrize("queries, keys", [(700, 700), (130, 700), (1, 700), (5, 642), (64, 640), (300, 1000)])
@pytest.mark.parametrize("score_block", [1, 4, 16, 64])
def test_lists_are_valid_and_within_budget(queries, keys, score_block):
    q, k = qk(0, queries, keys)
    mask = select_blocks(q, k, block_envelope(k, score_block), score_block=score_block, **OPTIONS)
    mask.check(queries, keys)
    assert mask.idx.shape[-1] == 4
    seen = token_mask(mask, 6, queries, keys)
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    always = (key <= position) & ((key < 4) | (key > position - 64))
    assert seen[..., always].all()


@pytest.mark.parametrize("score_block", [1, 16])
def test_scores_equal_the_formula(score_block):
    """Blocks chosen for whole query blocks are those of the plain fp32 formula."""
    q, k = qk(1, 640, 640)
    per, envelope = 64 // score_block, block_envelope(k, score_block)
    mask = select_blocks(q, k, envelope, score_block=score_block, slack=0.5, stride=1, budget=192, sinks=0, window=1)
    rows = q.unflatten(1, (2, 3)).unflatten(3, (10, 64)).transpose(2, 3).flatten(3, 4)
    visible = torch.arange(10 * per) < torch.arange(10)[:, None] * per
    scores = score_blocks(rows, envelope, visible, per, 32**-0.5, 0.5)
    for i in range(4, 10):
        best = scores[:, :, i].masked_fill(torch.arange(10) >= i, float("-inf")).topk(2).indices
        expected = torch.cat([best, torch.full_like(best[..., :1], i)], -1).sort(-1).values
        assert torch.equal(mask.idx[:, :, i], expected)


@pytest.mark.parametrize("score_block", [1, 16, 32, 64])
@pytest.mark.parametrize("queries", [1, 40, 700])
def test_a_needle_is_always_listed(queries, score_block):
    for seed in range(10):
        q, k = qk(seed, queries, 2000, heads=2, kv_heads=1, batch=1)
        needle = int(torch.randint(100, 1200, (1,), generator=torch.Generator().manual_seed(seed)))
        k[0, 0, needle] = 8 * q[0, :, -1].mean(0)
        mask = select_blocks(q, k, block_envelope(k, score_block), score_block=score_block, slack=1.0, **OPTIONS)
        assert needle // 64 in mask.idx[0, 0, -1].tolist()


def test_a_larger_budget_lists_a_superset():
    q, k = qk(3, 900, 900)
    small, large = (
        token_mask(select_blocks(q, k, block_envelope(k, 1), **{**OPTIONS, "budget": budget}), 6, 900, 900)
        for budget in (256, 512)
    )
    assert (large | ~small).all() and large.sum() > small.sum()


def test_block_aligned_chunks_choose_what_the_whole_prompt_chooses():
    q, k = qk(4, 640, 640)
    whole = select_blocks(q, k, block_envelope(k, 1), **OPTIONS)
    part = select_blocks(q[:, :, 256:512], k[:, :, :512], block_envelope(k[:, :, :512], 1), **OPTIONS)
    assert torch.equal(part.idx, whole.idx[:, :, 4:8])


@pytest.mark.parametrize("score_block", [1, 4])
def test_recall_beats_sinks_and_window_and_nears_the_oracle(score_block):
    """Attention mass on keys with locality, at equal budget and block size."""
    generator = torch.Generator().manual_seed(5)
    walk = torch.randn(1, 1, 2048, 32, generator=generator).cumsum(2)
    k = walk / walk.std() + 0.3 * torch.randn(1, 1, 2048, 32, generator=generator)
    q = 3 * k[:, :, torch.randint(0, 2048, (64,), generator=generator)] + torch.randn(1, 1, 64, 32, generator=generator)
    causal = torch.arange(2048) <= torch.arange(1984, 2048)[:, None]
    mass = (q @ k.transpose(-1, -2) * 32**-0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    per_block = mass.sum(2).unflatten(-1, (32, 64)).sum(-1)[0, 0]

    def recall(blocks):
        return float(per_block[blocks].sum() / 64)

    chosen = select_blocks(
        q, k, block_envelope(k, score_block), budget=512, sinks=4, window=64, score_block=score_block
    ).idx[0, 0, 0]
    always = torch.tensor([0, 30, 31])  # sinks, and a window of 64 tokens from the block's first row on
    oracle = torch.cat([always, per_block.index_fill(0, always, 0).topk(5).indices])
    # the score asks for the highest probability, the oracle for the most mass: near, not equal
    assert recall(chosen) >= 0.85 * recall(oracle)
    assert recall(chosen) > recall(torch.tensor([0, *range(25, 32)])) + 0.1


def test_one_row_outvotes_many_lukewarm_ones():
    """The row that needs a block gets it, whatever the other 63 rows of its query block would rather read."""
    torch.manual_seed(6)
    k = 0.1 * torch.randn(1, 1, 640, 32)
    q = torch.zeros(1, 2, 640, 32)
    k[0, 0, 200, 0], q[0, 1, -1, 0] = 40.0, 4.0  # only the last row looks at block 3
    k[0, 0, 300:600, 1], q[0, :, :-1, 1] = 6.0, 2.0  # all others prefer blocks 4 to 9
    mask = select_blocks(q, k, block_envelope(k, 1), budget=192, sinks=0, window=1)
    assert 3 in mask.idx[0, 0, -1].tolist()


def _decoding(refresh, steps=40, keys=300, **options):
    """The lists of successive one-token calls that share their state, and the number of keys of each."""
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(1, 2, keys + steps, 16, generator=generator)
    q = torch.randn(1, 4, steps, 16, generator=generator)
    config = Envelope(budget=192, dense_below=0, refresh=refresh, **options)
    runtime, state, found = config.runtime(None, (0,)), {}, []
    for step in range(steps):
        now = keys + step + 1
        call = SimpleNamespace(q=q[:, :, step : step + 1], k=k[:, :, :now], scale=0.25, state=state)
        mask = runtime.select(0, call)
        mask.check(1, now)
        found.append((mask, now))
    return found


def test_between_refreshes_the_choice_stays_and_the_own_block_is_read():
    fresh, kept = _decoding(1), _decoding(8)
    for step, ((new, keys), (held, _)) in enumerate(zip(fresh, kept)):
        own = (keys - 1) // 64
        assert int(held.idx[0, 0, 0, -1]) == own
        if step % 8 == 0:
            assert torch.equal(held.idx, new.idx)
        else:
            start, at = kept[step - step % 8]
            assert torch.equal(held.idx[..., :3], start.idx)
            assert held.idx.shape[-1] == 3 + (own > (at - 1) // 64)
    assert any(mask.idx.shape[-1] == 4 for mask, _ in kept)  # a block began between two refreshes
    assert any(not torch.equal(a.idx, b.idx[..., :3]) for (a, _), (b, _) in zip(fresh, kept))


def test_the_choice_is_made_anew_when_keys_move():
    """The cache empties the state when rows move; keys may also be fewer than at the last choice."""
    config = Envelope(budget=192, dense_below=0)
    runtime = config.runtime(None, (0,))
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 400, 16)
    state = {}
    runtime.select(0, SimpleNamespace(q=q, k=k, scale=0.25, state=state))
    shorter = k[:, :, :300]
    again = runtime.select(0, SimpleNamespace(q=q, k=shorter, scale=0.25, state=state))
    fresh = runtime.select(0, SimpleNamespace(q=q, k=shorter, scale=0.25, state={}))
    assert torch.equal(again.idx, fresh.idx)


@pytest.mark.parametrize("refresh", [0, 65])
def test_refresh_is_bounded_by_a_block(refresh):
    with pytest.raises(PlanError, match="refresh must be 1 to 64"):
        Envelope(refresh=refresh)
