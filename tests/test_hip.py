"""HiP and its stages: against plain loops, the contract, what is kept, and what decoding remembers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import GREEDY, MINIATURES, text_inputs

import infer_patch
from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.kernels import hip, hip_reference
from infer_patch.kernels.block_mask import causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.kernels.hip import Spans, Stage, block_lists, hip_stages, hip_tree
from infer_patch.patches import HiP
from infer_patch.patches import hip as patch_file

SHAPES = [(700, 700), (130, 700), (1, 700), (5, 642), (64, 640), (300, 1000), (65, 65), (3, 3), (1, 1)]
STAGES = (Stage(128, 256, 4), Stage(32, 96, 2), Stage(8, 32, 1))
TREES = [
    dict(budget=32, tree_block=2),
    dict(budget=34, tree_block=2, representative="first", stride=3, key_stride=2),
    dict(budget=48, tree_block=16, representative="first", key_stride=4),
    dict(budget=128, tree_block=64, stride=1, key_stride=16),
]
NOW = dict(dense_layers=0, dense_below=0, max_share=1.0)


def qk(seed, queries, keys, heads=6, kv_heads=2, size=16, batch=2):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator)
    return q, torch.randn(batch, kv_heads, keys, size, generator=generator)


def local_qk(seed, queries, keys, size=32):
    """Keys that walk slowly, and queries that look for one of two of them."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(1, 1, keys, size, generator=generator).cumsum(2)
    walk = walk - walk.mean(2, keepdim=True)
    k = walk / walk.std() + 0.3 * torch.randn(1, 1, keys, size, generator=generator)
    targets = torch.randint(0, keys, (2,), generator=generator)
    q = k[:, :, targets[torch.randint(0, 2, (queries,), generator=generator)]]
    return q + torch.randn(1, 1, queries, size, generator=generator), k


def pieces(kept, spans):
    """The kept pieces of every list as sorted numbers, like those of the reference."""
    return [
        [[sorted(x for x in row if x < spans.end(i)) for i, row in enumerate(one)] for one in sample]
        for sample in kept.tolist()
    ]


@pytest.mark.parametrize("lists", [2, 6])
@pytest.mark.parametrize("queries, keys", SHAPES)
def test_searches_keep_what_plain_loops_keep(queries, keys, lists):
    q, k = qk(keys, queries, keys)
    spans = Spans.of(queries, keys, 4, 70)
    for options in TREES:
        kept = hip_tree(q, k, spans, **options, lists=lists)
        assert pieces(kept, spans) == hip_reference.tree(q, k, spans, **options, lists=lists)
    kept = hip_stages(q, k, spans, STAGES, lists=lists)
    assert [x.shape[-1] <= s.keep // s.chunk for x, s in zip(kept, STAGES)] == [True] * 3
    assert pieces(kept[-1], spans) == hip_reference.stages(q, k, spans, STAGES, lists=lists)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 150), st.sampled_from([16, 64]), st.integers(65, 200))
def test_any_shape(seed, keys, queries, block, window):
    q, k = qk(seed, min(queries, keys), keys, heads=2, kv_heads=1, batch=1, size=8)
    queries, spans = q.shape[2], Spans.of(q.shape[2], keys, seed % 80, window, block)
    tree, stages = hip_tree(q, k, spans, budget=24, tree_block=8), hip_stages(q, k, spans, STAGES[1:])[-1]
    assert pieces(tree, spans) == hip_reference.tree(q, k, spans, budget=24, tree_block=8)
    assert pieces(stages, spans) == hip_reference.stages(q, k, spans, STAGES[1:])
    for kept in (tree, stages):
        block_lists(kept, spans, queries, keys).check(queries, keys)


@pytest.mark.parametrize("limit", [1, 1 << 16, 1 << 26])
def test_how_many_query_blocks_are_scored_together_does_not_matter(limit, monkeypatch):
    q, k = qk(1, 900, 900, batch=1)
    spans = Spans.of(900, 900, 4, 70)
    expected = [pieces(x, spans) for x in (hip_tree(q, k, spans, budget=32), *hip_stages(q, k, spans, STAGES))]
    monkeypatch.setitem(hip._SCORES_PER_CALL, "cpu", limit)
    found = [pieces(x, spans) for x in (hip_tree(q, k, spans, budget=32), *hip_stages(q, k, spans, STAGES))]
    assert found == expected


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("sinks, window", [(0, 65), (4, 100), (100, 256)])
def test_lists_are_valid_hold_sinks_and_window_and_stay_within_budget(queries, keys, sinks, window, block):
    q, k = qk(0, queries, keys)
    spans = Spans.of(queries, keys, sinks, window, block)
    most = {"tree": 32 // 2, "stages": 32 // 8}
    for name, kept in (
        ("tree", hip_tree(q, k, spans, budget=32, lists=6)),
        ("stages", hip_stages(q, k, spans, STAGES, lists=6)[-1]),
    ):
        mask = block_lists(kept, spans, queries, keys)
        mask.check(queries, keys)
        always = -(-sinks // block) + -(-(window - 1) // block) + 64 // block
        assert mask.idx.shape[-1] <= most[name] + always and mask.count.max() <= mask.idx.shape[-1]
        seen = token_mask(mask, 6, queries, keys)
        position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        promised = (key <= position) & ((key < sinks) | (key > position - window))
        assert seen[..., promised].all()


@pytest.mark.parametrize("queries, keys", [(700, 700), (130, 700), (1, 700), (5, 642)])
def test_a_budget_that_covers_the_span_is_dense_attention(queries, keys):
    q, k = qk(2, queries, keys)
    v = qk(3, queries, keys)[1]
    spans = Spans.of(queries, keys, 4, 70)
    dense = dense_attention(q, k, v, 0.25)
    for kept in (
        hip_tree(q, k, spans, budget=640),
        hip_tree(q, k, spans, budget=640, tree_block=16),
        hip_stages(q, k, spans, (Stage(64, 640),))[-1],
        hip_stages(q, k, spans, (Stage(256, 768, 4), Stage(8, 640, 1)))[-1],
    ):
        mask = block_lists(kept, spans, queries, keys)
        assert int(mask.blocks_read(2, 2)) == 4 * causal_blocks(queries, keys, 64, 64)
        torch.testing.assert_close(block_sparse_attention(q, k, v, mask, 0.25), dense, atol=1e-5, rtol=1e-5)


def test_block_aligned_chunks_choose_what_the_whole_prompt_chooses():
    q, k = qk(4, 640, 640)
    whole, part = Spans.of(640, 640, 4, 70), Spans.of(256, 512, 4, 70)
    q_part, k_part = q[:, :, 256:512], k[:, :, :512]
    expected = pieces(hip_tree(q, k, whole, budget=32), whole), pieces(hip_stages(q, k, whole, STAGES)[-1], whole)
    found = hip_tree(q_part, k_part, part, budget=32), hip_stages(q_part, k_part, part, STAGES)[-1]
    for ours, all_rows in zip(found, expected):
        assert pieces(ours, part) == [[rows[4:8] for rows in sample] for sample in all_rows]


@pytest.mark.parametrize(
    "config",
    [
        HiP(budget=32, **NOW),
        HiP(variant="stages", chunks=(64, 8), keep=(128, 32), stage_strides=(4, 1), stage_refresh=(1, 1), **NOW),
    ],
    ids=["tree", "stages"],
)
def test_a_decoded_token_reads_what_it_reads_as_the_last_row_of_a_prompt(config):
    """Where the last query block of the prompt holds one row."""
    q, k = qk(5, 961, 961)
    runtime = patch_file._HiP(config, None, ())
    whole = runtime.select(0, SimpleNamespace(q=q, k=k, state={}))
    one = runtime.select(0, SimpleNamespace(q=q[:, :, -1:], k=k, state={}))
    for b, m in itertools.product(range(2), range(2)):
        count = int(one.count[b, m, 0])
        assert count == whole.count[b, m, -1]
        assert one.idx[b, m, 0, :count].tolist() == whole.idx[b, m, -1, :count].tolist()


def test_batch_and_heads_are_independent():
    q, k = qk(6, 300, 700, heads=4, kv_heads=4)
    spans, heads = Spans.of(300, 700, 4, 70), [2, 0, 3, 1]
    moved = q.flip(0)[:, heads], k.flip(0)[:, heads]
    for search in (lambda q, k: hip_tree(q, k, spans, budget=32), lambda q, k: hip_stages(q, k, spans, STAGES)[-1]):
        expected = search(q, k).sort(-1).values.flip(0)[:, heads]
        assert torch.equal(search(*moved).sort(-1).values, expected)


def test_a_list_of_a_key_head_holds_the_best_of_each_of_its_query_heads():
    q, k = qk(7, 1, 700, heads=2, kv_heads=1, batch=1)
    spans = Spans.of(1, 700, 0, 65)
    shared, alone = hip_tree(q, k, spans, budget=64), hip_tree(q, k, spans, budget=64, lists=2)
    scores = (q[0] @ k[0, 0].T).amax((0, 1))
    assert scores[shared].max() == scores[alone].max()
    assert alone.shape == (1, 2, 1, 32) and not torch.equal(*alone[0].sort(-1).values)


@pytest.mark.parametrize("queries", [1, 200])
def test_keys_in_half_precision_and_in_a_larger_buffer(queries):
    """Products are those of the rounded numbers in fp32, whatever the type and the strides."""
    q, k = (x.to(torch.bfloat16) for x in qk(8, queries, 700))
    buffer = torch.full((2, 2, 800, 16), 7.0, dtype=torch.bfloat16)
    buffer[:, :, 50:750] = k
    spans = Spans.of(queries, 700, 4, 70)
    for search in (
        lambda q, k: hip_tree(q, k, spans, budget=32),
        lambda q, k: hip_tree(q, k, spans, budget=64, tree_block=16, key_stride=4),
        lambda q, k: hip_stages(q, k, spans, STAGES)[-1],
    ):
        expected = pieces(search(q.float(), k.float()), spans)
        assert pieces(search(q, buffer[:, :, 50:750]), spans) == expected


@pytest.mark.parametrize("queries", [1, 700])
def test_nothing_is_read_back_to_the_host(queries):
    """On the meta device there is nothing to read: `.item()`, `nonzero` and the like fail."""
    q, k = (x.to("meta") for x in qk(9, queries, 700))
    spans = Spans.of(queries, 700, 4, 70)
    for kept in (hip_tree(q, k, spans, budget=32), *hip_stages(q, k, spans, STAGES)):
        assert block_lists(kept, spans, queries, 700).count.device.type == "meta"


# What is kept


def share_of_mass(q, k, kept, spans):
    """Share of the attention mass between sinks and window that the lists read, and that random blocks would."""
    queries, keys = q.shape[2], k.shape[2]
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    mass = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    between = mass[..., spans.start : spans.end(0)]
    mask = block_lists(kept, spans, queries, keys)
    seen = token_mask(mask, q.shape[1], queries, keys)[..., spans.start : spans.end(0)]
    return float((between * seen).sum() / between.sum()), float(seen.float().mean())


def kept_by(name, q, k, spans, budget):
    if name == "tree":
        return hip_tree(q, k, spans, budget=budget)
    return hip_stages(q, k, spans, (Stage(128, 8 * budget, 4), Stage(32, 2 * budget, 2), Stage(8, budget, 1)))[-1]


@pytest.mark.parametrize("name", ["tree", "stages"])
def test_on_keys_with_locality_more_is_found_than_by_chance_and_more_with_a_larger_budget(name):
    found, chance = {64: [], 128: []}, []
    for seed, budget in itertools.product(range(4), (64, 128)):
        q, k = local_qk(seed, 64, 4096)
        spans = Spans.of(64, 4096, 16, 256)
        mass, random = share_of_mass(q, k, kept_by(name, q, k, spans, budget), spans)
        found[budget].append(mass)
        chance += [random] if budget == 128 else []
    mean = {budget: sum(x) / 4 for budget, x in found.items()}
    assert mean[128] >= sum(chance) / 4 + 0.1
    assert mean[128] >= mean[64] - 0.02


@pytest.mark.parametrize("name", ["tree", "stages"])
def test_a_needle_among_keys_with_locality(name):
    """8 sigma above the other keys, falling off over 8 tokens: 20 of 20 (an isolated one would be found by luck)."""
    hits = 0
    for seed in range(20):
        q, k = local_qk(seed, 1, 4096)
        needle = int(torch.randint(200, 3600, (1,), generator=torch.Generator().manual_seed(seed)))
        near = (-(torch.arange(4096) - needle).abs() / 8).exp()[:, None]
        direction = torch.nn.functional.normalize(q, dim=-1)
        score = (k * direction).sum(-1, keepdim=True)
        k = k + near * (score.mean() + 8 * score.std() - score) * direction
        spans = Spans.of(1, 4096, 16, 256)
        mask = block_lists(kept_by(name, q, k, spans, 128), spans, 1, 4096)
        hits += needle // 64 in mask.idx[0, 0, 0, : mask.count[0, 0, 0]].tolist()
    assert hits >= 19


# What decoding remembers


class Decoding:
    """One layer's decode steps on growing keys, with the searches they start."""

    def __init__(self, config, keys, monkeypatch, batch=1):
        self.q, self.k = qk(10, keys, keys, batch=batch)
        self.runtime = patch_file._HiP(config, None, ())
        self.state, self.searches = {}, []
        for name in ("hip_tree", "hip_stages"):
            monkeypatch.setattr(patch_file, name, self._noted(getattr(patch_file, name)))

    def _noted(self, search):
        def noted(*args, **kwargs):
            self.searches.append((self.keys, len(kwargs.get("reuse", ()))))
            return search(*args, **kwargs)

        return noted

    def step(self, keys, queries=1):
        self.keys = keys
        q, k = self.q[:, :, keys - queries : keys], self.k[:, :, :keys]
        mask = self.runtime.select(0, SimpleNamespace(q=q, k=k, state=self.state))
        mask.check(queries, keys)
        return mask


def test_the_search_is_repeated_every_few_tokens_and_new_tokens_are_always_seen(monkeypatch):
    decoding = Decoding(HiP(budget=32, window=128, refresh=8, **NOW), 1000, monkeypatch)
    before = None
    for keys in range(800, 900):
        mask = decoding.step(keys)
        seen = token_mask(mask, 6, 1, keys)
        assert seen[..., keys - 128 :].all() and seen[..., :16].all()
        entries = [set(mask.idx[0, m, 0, : mask.count[0, m, 0]].tolist()) for m in range(2)]
        if before is not None and decoding.searches[-1][0] != keys:
            assert all(a <= b for a, b in zip(before, entries)), "what was read stays in sight until the next search"
        before = entries
    assert decoding.searches == [(keys, 0) for keys in range(800, 900, 8)]


def test_stages_are_repeated_each_at_its_own_pace(monkeypatch):
    config = HiP(variant="stages", chunks=(128, 32, 8), keep=(256, 96, 32), stage_refresh=(16, 8, 4), **NOW)
    decoding = Decoding(config, 1000, monkeypatch)
    for keys in range(800, 833):
        decoding.step(keys)
    assert decoding.searches == [
        (800, 0),
        (804, 2),
        (808, 1),
        (812, 2),
        (816, 0),
        (820, 2),
        (824, 1),
        (828, 2),
        (832, 0),
    ]


def test_a_later_stage_run_again_is_that_of_the_whole_search(monkeypatch):
    """On equal queries and keys, stages computed in turn keep what stages computed at once keep."""
    config = HiP(variant="stages", chunks=(64, 8), keep=(192, 32), stage_strides=(1, 1), stage_refresh=(8, 1), **NOW)
    decoding = Decoding(config, 1000, monkeypatch)
    decoding.q[:] = decoding.q[:, :, :1]
    decoding.step(800)
    again, state = decoding.step(805), dict(decoding.state)
    decoding.state.clear()
    fresh = decoding.step(805)
    assert decoding.searches == [(800, 0), (805, 1), (805, 0)]
    assert torch.equal(again.idx, fresh.idx) and state[config][1] == (800, 805)


@pytest.mark.parametrize("what", ["keys moved", "a second turn"])
def test_what_does_not_fit_any_more_is_searched_again(what, monkeypatch):
    decoding = Decoding(HiP(budget=32, **NOW), 1000, monkeypatch)
    decoding.step(800)
    if what == "keys moved":
        decoding.state.clear()  # the cache does this for beams and crops
        decoding.step(801)
        assert decoding.searches == [(800, 0), (801, 0)]
    else:
        decoding.step(900, queries=100)
        decoding.step(901)
        assert decoding.searches == [(800, 0), (900, 0), (901, 0)]


def test_two_plans_on_one_cache_do_not_share_what_they_remember(monkeypatch):
    decoding = Decoding(HiP(budget=32, **NOW), 1000, monkeypatch)
    decoding.step(800)
    decoding.runtime = patch_file._HiP(HiP(budget=64, **NOW), None, ())
    decoding.step(801)
    assert decoding.searches == [(800, 0), (801, 0)]


# The method


def test_layers():
    model = MINIATURES["llama"].build()
    parts = describe(model)
    assert HiP().resolve_layers(parts) == (3,)
    assert HiP(dense_layers=1).resolve_layers(parts) == (1, 2, 3)
    assert HiP(layers=(0, 2)).resolve_layers(parts) == (0, 2)
    assert HiP().resolve_layers(describe(MINIATURES["llama"].build(num_hidden_layers=33)))[0] == 4
    with pytest.raises(
        UnsupportedModelError, match=r"hip: the first 4 layers stay dense, and llama has no other layer"
    ):
        infer_patch.patch(model, HiP(dense_layers=4))


@pytest.mark.parametrize(
    "config, reason",
    [
        (HiP(budget=640, **NOW), "sinks, window and budget cover every key"),
        (HiP(budget=32, dense_layers=0), "at most 2048 keys"),
        (HiP(budget=32, dense_layers=0, dense_below=0, max_share=0.1), "more than about 10% of the key blocks"),
    ],
)
def test_where_sparse_cannot_win_it_runs_dense_and_says_why(config, reason):
    model = MINIATURES["llama"].build()
    with pytest.warns(UserWarning, match="never took effect"), infer_patch.patch(model, config) as handle:
        model(**text_inputs(MINIATURES["llama"], lengths=(700,)))
        report = handle.report()
    assert reason in str(report) and report.silent == ["hip"]


def test_the_report_tells_the_share_that_was_really_read():
    model = MINIATURES["llama"].build()
    with infer_patch.patch(model, HiP(budget=32, window=100, **NOW)) as handle:
        model.generate(**text_inputs(MINIATURES["llama"], lengths=(700,)), **GREEDY)
        figures = handle.report().methods["hip"]
    assert figures["sparse_calls"] == {"prefill": 4, "decode": 28}
    assert 0.3 < figures["blocks_read"] / figures["blocks_causal"] < 0.99


@pytest.mark.parametrize("name", ["tree", "stages"])
def test_the_estimated_share_lies_near_the_real_one(name):
    q, k = local_qk(0, 4096, 4096)
    spans = Spans.of(4096, 4096, 16, 256)
    read = int(block_lists(kept_by(name, q, k, spans, 256), spans, 4096, 4096).count.sum())
    real = read / causal_blocks(4096, 4096, 64, 64)
    assert patch_file.estimated_share(spans, 4096, 4096, 256, {"tree": 2, "stages": 8}[name]) == pytest.approx(
        real, rel=0.4
    )


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(variant="forest"), "variant must be tree or stages, got 'forest'"),
        (dict(tree_block=24), "tree_block must be a power of two from 1 to 64, got 24"),
        (dict(budget=511), r"budget must be a multiple of tree_block \(2 tokens\), got 511"),
        (dict(key_stride=4), r"key_stride must be 1 to tree_block \(2\), got 4"),
        (dict(window=64), "a window of at least 72 tokens, .* got window=64"),
        (dict(variant="stages", window=72), "a window of at least 80 tokens, .* got window=72"),
        (dict(chunks=(64, 24, 8)), "chunks must shrink, each a multiple of the next"),
        (dict(chunks=(384, 192, 96)), "chunks must shrink, .* the last one of 2, 4, ... 64"),
        (dict(chunks=(64, 8)), "chunks has 2, keep has 3"),
        (dict(chunks=64), "chunks must be a list of numbers from 1 up, got 64"),
        (dict(keep=(2048, 8192, 2048)), "keep must not grow from stage to stage"),
        (dict(stage_strides=(4, 4, 65)), "stage_strides must be 1 to 64"),
        (dict(layers=(5,), dense_layers=3), "either `layers` .* or `dense_layers`"),
        (dict(max_share=0), "max_share must be above 0"),
    ],
)
def test_mistakes_are_named(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        HiP(**options)


def test_stages_survive_a_plan_file(tmp_path):
    config = HiP(variant="stages", chunks=(64, 8), keep=(256, 64), stage_strides=(2, 1), stage_refresh=(8, 4))
    infer_patch.Plan((config,)).save(tmp_path / "plan.yaml")
    assert infer_patch.Plan.load(tmp_path / "plan.yaml").methods == (config,)
