"""Vertical-slash selection: scores against the plain formula, planted columns and diagonals, contract, bound."""

import pytest
import torch

from infer_patch.errors import PlanError
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.patches.vertical_slash import (
    VerticalSlash,
    column_and_diagonal_scores,
    keep_best,
    list_blocks,
    most_blocks,
)
from infer_patch.run import AttentionCall
from infer_patch.tokens import Tokens


def qk(seed, queries, keys, heads=6, kv_heads=2, size=32, batch=2):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator)
    return q, torch.randn(batch, kv_heads, keys, size, generator=generator)


def select(q, k, **options):
    runtime = VerticalSlash(dense_below=0, **options).runtime(None, (0,))
    batch, _, queries, size = q.shape
    tokens = Tokens(batch, queries, k.shape[2] - queries, mask=None, image=None, device=q.device)
    call = AttentionCall(q, k, k, size**-0.5, [*range(batch)], tokens, torch.arange(k.shape[2]).expand(batch, -1))
    return runtime.select(0, call)


@pytest.mark.parametrize("rows, keys", [(64, 300), (64, 64), (5, 40), (1, 7)])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_scores_equal_the_formula(rows, keys, per_query_head):
    q, k = qk(0, rows, keys)
    position = torch.arange(keys - rows, keys)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.2
    p = scores.masked_fill(torch.arange(keys) > position[:, None], float("-inf")).softmax(-1)
    diagonals = torch.zeros(2, 6, keys)
    for r in range(rows):
        for key in range(int(position[r]) + 1):
            diagonals[..., int(position[r]) - key] += p[:, :, r, key]
    expected = [p.sum(2), diagonals]
    if not per_query_head:
        expected = [x.unflatten(1, (2, 3)).sum(2) for x in expected]
    for found, wanted in zip(column_and_diagonal_scores(q, k, 0.2, per_query_head), expected):
        torch.testing.assert_close(found, wanted)


def test_planted_columns_and_diagonals_are_found():
    torch.manual_seed(1)
    keys, size = 1280, 1280
    k = torch.eye(keys)[None, None]  # key j is the j-th unit vector: a query says which keys it reads
    q = torch.zeros(1, 1, keys, size)
    rows = torch.arange(keys)
    q[0, 0, :, 300] = q[0, 0, :, 777] = 400.0
    for apart in (0, 450, 700):
        q[0, 0, rows[apart:], rows[apart:] - apart] = 400.0
    columns, diagonals = column_and_diagonal_scores(q[:, :, -64:], k, size**-0.5, False)
    # a row reads two columns and three diagonals, a fifth of its probability each
    assert set(keep_best(columns, 2, 0)[0, 0].tolist()) == {300, 777}
    assert set(keep_best(diagonals, 3, 0)[0, 0].tolist()) == {0, 450, 700}
    mask = select(q, k, columns=2, first=0, diagonals=3, nearest=1)
    mask.check(keys, keys)
    seen = token_mask(mask, 1, keys, keys)[0, 0]
    for apart in (0, 450, 700):
        assert seen[rows[apart:], rows[apart:] - apart].all()
    assert seen[300:, 300].all() and seen[777:, 777].all()
    # last query block, 19: its own; columns in 4 and 12; 450 = 7 * 64 + 2 and 700 = 10 * 64 + 60 cross two blocks each
    assert mask.idx[0, 0, -1, : mask.count[0, 0, -1]].tolist() == [4, 8, 9, 11, 12, 19]


@pytest.mark.parametrize("queries, keys", [(700, 700), (130, 700), (64, 642), (64, 640), (300, 1000), (321, 3000)])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("columns, diagonals", [(30, 100), (31, 103), (50, 140)])
def test_lists_are_valid_and_nothing_is_cut_off(queries, keys, columns, diagonals, per_query_head):
    q, k = qk(2, queries, keys)
    mask = select(q, k, columns=columns, diagonals=diagonals, per_query_head=per_query_head)
    mask.check(queries, keys)
    assert mask.idx.shape[1] == (6 if per_query_head else 2)
    assert mask.idx.shape[-1] == min(most_blocks(columns, diagonals, 30, 100), -(-keys // 64))
    seen = token_mask(mask, 6, queries, keys)
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    always = (key <= position) & ((key < 30) | (key > position - 100))
    assert seen[..., always].all()


def test_the_bound_on_a_list_is_reached():
    """Columns and diagonals that share no block: the longest list there can be, so a smaller bound would cut it."""
    columns = torch.tensor([*range(30), 70, 640])
    diagonals = torch.tensor([*range(100), 1000])
    bound = most_blocks(32, 101, 30, 100)
    mask = list_blocks(columns[None, None], diagonals[None, None], 64, 6400, bound)
    mask.check(64, 6400)
    assert mask.count.item() == bound == 8


@pytest.mark.parametrize("queries, keys", [(300, 300), (130, 333), (64, 400)])
def test_lists_hold_just_the_blocks_that_are_crossed(queries, keys):
    generator = torch.Generator().manual_seed(3)
    columns = torch.randperm(keys, generator=generator)[:3]
    diagonals = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(keys, generator=generator)[:2]])
    mask = list_blocks(columns[None, None], diagonals[None, None], queries, keys, 100)
    first, count = mask.diagonal(queries, keys)
    for i in range(count):
        rows = range(
            (first + i) * 64, (first + i + 1) * 64
        )  # whole query blocks: a chunk must list what the prompt does
        expected = {int(c) // 64 for c in columns if int(c) // 64 <= first + i}
        expected |= {(row - int(d)) // 64 for row in rows for d in diagonals if row >= d}
        assert mask.idx[0, 0, i, : mask.count[0, 0, i]].tolist() == sorted(expected)


@pytest.mark.parametrize("queries, keys", [(700, 700), (130, 700)])
def test_all_columns_are_dense_attention(queries, keys):
    q, k = qk(4, queries, keys)
    assert select(q, k, columns=keys, diagonals=100) == "columns or diagonals cover every key"
    every = torch.arange(keys).expand(2, 2, -1)
    mask = list_blocks(every, torch.zeros(2, 2, 1, dtype=torch.long), queries, keys, 10**6)
    mask.check(queries, keys)
    dense = dense_attention(q, k, k, 32**-0.5)
    torch.testing.assert_close(block_sparse_attention(q, k, k, mask), dense, atol=1e-5, rtol=1e-5)


def test_heads_and_samples_are_chosen_for_alone():
    q, k = qk(5, 400, 400, heads=2)
    mask = select(q, k, columns=40, diagonals=101)
    turned = select(q.flip(0, 1), k.flip(0, 1), columns=40, diagonals=101)
    assert torch.equal(turned.idx.flip(0, 1), mask.idx) and torch.equal(turned.count.flip(0, 1), mask.count)
    assert not torch.equal(mask.idx[0, 0], mask.idx[1, 1])


def test_decoding_and_short_chunks_run_dense():
    q, k = qk(6, 1, 400)
    assert select(q, k) == "fewer than 64 new tokens: decoding is dense"
    q, k = qk(6, 63, 400)
    assert select(q, k) == "fewer than 64 new tokens: decoding is dense"


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"columns": 29}, "columns include the first 30"),
        ({"diagonals": 99}, "diagonals include the 100 nearest"),
        ({"nearest": 0}, "nearest must be 1 or more diagonals, got 0"),
        ({"first": -1}, "first must be 0 or more columns, got -1"),
        ({"dense_below": -1}, "dense_below must be 0 or more tokens, got -1"),
    ],
)
def test_options_are_checked(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        VerticalSlash(**options)
