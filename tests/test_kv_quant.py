"""The mixed-precision cache: exact at 16 bits in every mode of decoding, exact bytes, nothing quantised twice."""

import hashlib
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from miniatures import EOS, GREEDY, MINIATURES, text_inputs
from transformers import DynamicCache

import infer_patch
from infer_patch.availability import crop_is_relative
from infer_patch.errors import ConflictError, PlanError, UnsupportedCallError, UnsupportedModelError
from infer_patch.kernels.kv_pack import dequantise
from infer_patch.kv_policy import Policy, draw_probes
from infer_patch.packed_tail import NewTokens
from infer_patch.patches import Envelope, KVQuant

LLAMA = MINIATURES["llama"]
SMALL = dict(sinks=4, recent=20, window=16, group=32)
MIXED = KVQuant(important=0.4, **SMALL)
FEWER_FOR_VALUES = KVQuant(bits=8, other_bits=4, important=0.4, value_bits=4, **SMALL)


class SixteenBits(Policy):
    """Packs like 4/2 bits, in two pools and out of order, but loses nothing."""

    mixed = packs = True
    widths = (16, 16)


@dataclass(frozen=True, kw_only=True)
class Pools16(KVQuant):
    def policy(self, layer):
        return SixteenBits(important=0.4, **SMALL)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False, **options})


def prefilled(model, inputs):
    """The cache after a prompt."""
    with torch.no_grad():
        return model(**inputs, use_cache=True).past_key_values


# --- 16 bits: the default cache, token for token -----------------------------------------------------------

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "two beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "two samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 64},
}


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_bit_pools_are_the_default_cache(mode):
    """A left-padded batch whose cache is permuted and split into pools."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90, 121), seed=1)
    expected = generate(model, inputs, **MODES[mode])
    if mode == "chunks" and not torch.equal(expected, generate(model, inputs)):
        pytest.skip("this transformers gives padded batches something else in chunks, unpatched (5.2 does)")
    with infer_patch.patch(model, Pools16()):
        assert torch.equal(generate(model, inputs, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", ["assisted", "lookup"])
def test_drafts_on_sixteen_bit_pools(mode):
    model, assistant = LLAMA.build(), LLAMA.build(num_hidden_layers=2)
    inputs = text_inputs(LLAMA, lengths=(150,), seed=1)
    options = {"assistant_model": assistant} if mode == "assisted" else {"prompt_lookup_num_tokens": 5}
    expected = generate(model, inputs, eos_token_id=EOS)
    with infer_patch.patch(model, Pools16()):
        assert torch.equal(generate(model, inputs, eos_token_id=EOS, **options), expected)


@pytest.mark.parametrize("more", [5, 70])
def test_a_second_turn_on_sixteen_bit_pools(more):
    """Few new tokens read the pools as they are, many a copy in full precision."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90, 121), seed=1)
    question = text_inputs(LLAMA, lengths=(more,) * 3, seed=5)["input_ids"]

    def two_turns():
        first = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 40 + more, dtype=torch.long)], 1)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)

    expected = two_turns()
    with infer_patch.patch(model, Pools16()):
        assert torch.equal(two_turns(), expected)


def test_logits_of_pools_are_close_to_the_default_cache():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90), seed=1)
    options = dict(GREEDY, output_logits=True, return_dict_in_generate=True)
    expected = torch.stack(model.generate(**inputs, **options).logits)
    with infer_patch.patch(model, Pools16()):
        torch.testing.assert_close(torch.stack(model.generate(**inputs, **options).logits), expected)


def cropped(cache, remove):
    for layer in cache.layers:
        layer.crop(-remove if crop_is_relative() else layer.get_seq_length() - remove)
    return cache


def continued(model, cache, mask, ids):
    """Logits of further tokens after a cache, one at a time."""
    with torch.no_grad():
        for i in range(ids.shape[1]):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
            out = model(input_ids=ids[:, i : i + 1], attention_mask=mask, past_key_values=cache)
            cache = out.past_key_values
    return out.logits[:, -1]


@pytest.mark.parametrize("remove", [0, 7, 20, 60, 110])
def test_cropping_into_packed_storage(remove):
    """Tokens are dropped by their numbers: 7 are in the tail, 60 and 110 reach into both pools."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 121), seed=1)
    left = inputs["attention_mask"][:, : 150 - remove]
    more = text_inputs(LLAMA, lengths=(40, 40), seed=9)["input_ids"]
    expected = continued(model, cropped(prefilled(model, inputs), remove), left, more)
    with infer_patch.patch(model, Pools16()):
        cache = cropped(prefilled(model, inputs), remove)
        assert cache.get_seq_length() == 150 - remove
        torch.testing.assert_close(continued(model, cache, left, more), expected)


def test_cropping_everything_empties_the_cache():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150,), seed=1)
    with infer_patch.patch(model, MIXED):
        cache = cropped(prefilled(model, inputs), 150)
    assert cache.get_seq_length() == 0 and all(layer.nbytes() == 0 for layer in cache.layers)


def test_reordering_selecting_and_repeating():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90, 121), seed=1)
    orders = torch.tensor([2, 2, 0]), torch.tensor([1, 0, 2])
    chosen = orders[0][orders[1]].repeat_interleave(2)[torch.tensor([0, 3, 4])]
    more = text_inputs(LLAMA, lengths=(30, 30, 30), seed=9)["input_ids"]
    alone = {name: value[chosen] for name, value in inputs.items()}
    with infer_patch.patch(model, MIXED):
        expected = continued(model, prefilled(model, alone), alone["attention_mask"], more)
        cache = prefilled(model, inputs)
        for order in orders:
            cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 4]))
        torch.testing.assert_close(continued(model, cache, alone["attention_mask"], more), expected)


# --- bytes -------------------------------------------------------------------------------------------------


def formula(policy, heads, dim, element, packed, tail, batch=1):
    """Bytes of one layer by section 4.3: `packed` lists (bits, tokens) of every group, `tail` counts rows."""
    total = 2 * tail * heads * dim * element
    for bits, tokens in packed:
        rows = 16 * math.ceil(tokens / 16)
        if bits == 16:
            total += 2 * rows * heads * dim * element
        else:
            codes = bits + min(bits, policy.value_bits or bits)  # of keys, and of values
            total += rows * heads * dim * codes // 8 + 2 * heads * dim * 2 + 2 * rows * heads * 2 + heads * dim * 2
        total += 4 * rows if policy.mixed else 0
    return total


def cut(tokens, group):
    return [group] * (tokens // group) + ([tokens % group] if tokens % group else [])


def expected_groups(policy, packs):
    """(bits, tokens) of the groups that packing so many tokens at a time makes."""
    groups = []
    for tokens in packs:
        high = policy.count(tokens) if policy.mixed else tokens
        groups += [(policy.widths[0], n) for n in cut(high, policy.group)]
        groups += [(policy.widths[-1], n) for n in cut(tokens - high, policy.group)]
    return groups


@pytest.mark.parametrize(
    "method",
    [KVQuant(bits=8, **SMALL), KVQuant(bits=2, **SMALL), MIXED, FEWER_FOR_VALUES],
    ids=["8", "2", "4/2", "8/4 with values in 4"],
)
def test_bytes_are_those_of_the_formula(method):
    """After a prompt, while decoding, and for samples of other lengths."""
    model, lengths = LLAMA.build(), (200, 131)
    inputs = text_inputs(LLAMA, lengths=lengths, seed=1)
    policy, text = method.policy(0), model.config
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    packs = [[(n - 24) // 16 * 16] for n in lengths]
    with torch.no_grad(), infer_patch.patch(model, method) as handle:
        cache, mask = prefilled(model, inputs), inputs["attention_mask"]
        for step in range(40):
            expected = 0
            for sample, length in enumerate(lengths):
                tail = length + step - sum(packs[sample])
                assert 24 <= tail < 24 + 16
                expected += formula(policy, heads, dim, 4, expected_groups(policy, packs[sample]), tail)
            assert [layer.nbytes() for layer in cache.layers] == [expected] * len(cache.layers)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            model(input_ids=torch.full((2, 1), 50), attention_mask=mask, past_key_values=cache)
            for sample, length in enumerate(lengths):
                if length + step + 1 - sum(packs[sample]) == 24 + 16:
                    packs[sample].append(16)
        figures = handle.report().methods["kv_quant"]
        assert sum(figures["bytes_by_precision"].values()) == sum(layer.nbytes() for layer in cache.layers)
        whole = sum(n + 40 for n in lengths) * len(cache.layers) * 2 * heads * dim * 4
        assert figures["bytes_unquantised"] == whole
        assert "x smaller than unquantised" in str(handle.report())
        assert all(len(packs[sample]) > 2 for sample in (0, 1))


@pytest.mark.parametrize(
    "method, least",
    [(KVQuant(bits=4), 3.7), (KVQuant(bits=2), 6.9), (KVQuant(important=0.421), 5.0)],
    ids=["4", "2", "4/2"],
)
def test_packed_tokens_at_a_head_size_of_128(method, least):
    """Of what is packed, in bf16 with 8 key heads: the layout's promise."""
    policy = method.policy(0)
    tokens = 128 * 400
    packed = formula(policy, 8, 128, 2, expected_groups(policy, [tokens]), 0)
    assert tokens * 2 * 8 * 128 * 2 / packed >= least


def test_a_real_layer_at_a_head_size_of_128():
    """The same of a cache, tail and all."""
    model = LLAMA.build(hidden_size=256, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1).bfloat16()
    inputs = text_inputs(LLAMA, lengths=(4096 + 68,), seed=1)
    with infer_patch.patch(model, KVQuant(bits=4)) as handle:
        prefilled(model, inputs)
        figures = handle.report().methods["kv_quant"]
    packed = figures["bytes_by_precision"]["4 bits"]
    assert packed == formula(KVQuant().policy(0), 2, 128, 2, [(4, 128)] * 32, 0)
    assert 4096 * 2 * 2 * 128 * 2 / packed > 3.7
    assert figures["bytes_unquantised"] / sum(figures["bytes_by_precision"].values()) > 3.5


def test_no_history_is_quantised_again():
    """Bytes that are packed stay as they are, whatever comes after them."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90), seed=1)

    def hashes(layer, samples):
        digest = {}
        for pool in layer.pools:
            for size, slab in pool.slabs.items():
                for b in samples:
                    for g in range(slab.used[b]):
                        parts = [x[b, :, g].numpy().tobytes() for x in slab.data.tensors().values()]
                        digest[pool.bits, size, b, g] = hashlib.sha256(b"".join(parts)).hexdigest()
        return digest

    with infer_patch.patch(model, MIXED):
        cache = prefilled(model, inputs)
        before = [hashes(layer, (0, 1)) for layer in cache.layers]
        more = text_inputs(LLAMA, lengths=(50, 50), seed=9)["input_ids"]
        continued(model, cache, inputs["attention_mask"], more)
        after = [hashes(layer, (0, 1)) for layer in cache.layers]
    for old, new in zip(before, after):
        assert len(new) > len(old) > 0
        assert all(new[key] == value for key, value in old.items())


# --- what is packed ----------------------------------------------------------------------------------------


def test_a_sample_is_packed_as_if_alone():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90), seed=1)
    alone = text_inputs(LLAMA, lengths=(150, 90), seed=1, only=1)
    with infer_patch.patch(model, MIXED):
        both, one = prefilled(model, inputs), prefilled(model, alone)
    for a, b in zip(both.layers, one.layers):
        for pool, other in zip(a.pools, b.pools):
            assert any(slab.used[1] for slab in pool.slabs.values())
            for size, slab in other.slabs.items():
                held = pool.slabs[size]
                assert slab.used[0] == held.used[1]
                assert torch.equal(held.tokens[1, :, : slab.used[0]], slab.tokens[0, :, : slab.used[0]])


def test_important_tokens_are_those_that_probes_read():
    policy = Policy(bits=4, other_bits=2, important=0.5, group=16)
    mass = torch.tensor([[1.0, 8.0, 3.0, 0.5] * 8, [1.0, 0.0, 3.0, 0.5] * 8])
    seen = torch.tensor([1, 1, 1, 1] * 8)
    chosen = policy.choose(mass, seen)
    assert chosen.sum() == 16 and chosen[0].tolist() == [False, True, True, False] * 8
    few = torch.tensor([4, 4, 4, 1] * 8)  # the fourth is seen by one probe only: 1 in all against 0.5, 2, 1.5
    assert policy.choose(mass, few)[0].nonzero()[:, 0].tolist() == [i for i in range(32) if i % 4 in (1, 2)]
    heads = Policy(bits=4, other_bits=2, important=0.25, group=16, per_head=True).choose(
        mass.repeat(1, 2), seen.repeat(2)
    )
    assert heads.shape == (2, 64) and heads.sum(1).tolist() == [16, 16] and not torch.equal(heads[0], heads[1])


def test_probes_are_the_newest_and_a_seeded_draw():
    new = NewTokens(100, 100, None, (100, 100), None)
    positions = torch.arange(100).expand(2, -1)
    probes = draw_probes(new, positions, 10, 6, seed=3)
    assert probes.rows[0].tolist() == probes.rows[1].tolist()
    assert probes.rows[0, 6:].tolist() == list(range(90, 100))
    drawn = probes.rows[0, :6].tolist()
    assert drawn == sorted(set(drawn)) and max(drawn) < 90
    assert not torch.equal(draw_probes(new, positions, 10, 6, seed=4).rows, probes.rows)
    short = draw_probes(NewTokens(3, 3, None, (3,), None), torch.arange(3)[None], 10, 6, seed=3)
    assert short.rows.tolist() == [[0, 1, 2]]


def test_recent_tokens_and_sinks_stay_exact():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150,), seed=1)
    plain = prefilled(model, inputs)
    with infer_patch.patch(model, KVQuant(bits=2, **SMALL)):
        cache = prefilled(model, inputs)
    tail = cache.layers[0].tail
    assert tail.filled == [150 - 112]  # 7 windows of 16
    for buffer, whole in ((tail.keys, plain.layers[0].keys), (tail.values, plain.layers[0].values)):
        assert torch.equal(buffer[:, :, :4], whole[:, :, :4])
        assert torch.equal(buffer[:, :, 4:38], whole[:, :, -34:])


@pytest.mark.parametrize("method", [KVQuant(bits=4, **SMALL), MIXED], ids=["4", "4/2"])
def test_the_prompt_in_full_precision_is_let_go(method):
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    with infer_patch.patch(model, method):
        layer = prefilled(model, inputs).layers[0]
    assert layer.packed == [272]
    for x in (layer.keys, layer.values):  # no rows: not even as a view of the prompt's
        assert x.shape[2] == 0 and x.untyped_storage().nbytes() == 0
    for x in (layer.tail.keys, layer.tail.values):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_values_in_fewer_bits_than_keys():
    """Keys are those of their own width, values those of theirs; reports tell both."""
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    layers = {}
    for name, options in {"4": {"bits": 4}, "2": {"bits": 2}, "4, 2": {"bits": 4, "value_bits": 2}}.items():
        with infer_patch.patch(model, KVQuant(**options, **SMALL)) as handle:
            cache = prefilled(model, inputs)
            layers[name] = next(iter(cache.layers[0].pools[0].slabs.values())).view()
            said = handle.report().methods["kv_quant"]["bytes_by_precision"]
    assert "4 (values 2) bits" in said
    assert torch.equal(layers["4, 2"].key_codes, layers["4"].key_codes)
    assert torch.equal(layers["4, 2"].value_codes, layers["2"].value_codes)
    (keys, values), (wide, _), (_, narrow) = (dequantise(layers[name]) for name in ("4, 2", "4", "2"))
    assert torch.equal(keys, wide) and torch.equal(values, narrow)


def test_values_never_take_more_bits_than_keys():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    with infer_patch.patch(model, KVQuant(bits=8, other_bits=2, important=0.4, value_bits=4, **SMALL)):
        layer = prefilled(model, inputs).layers[0]
    assert [{groups.bits_of_values for groups in pool.groups()} for pool in layer.pools] == [{4}, {2}]


@pytest.mark.parametrize("split", [(2, 2), (4, 4), (8, 8), (4, 2)], ids=str)
def test_two_pools_hold_what_one_would(split):
    """Tokens out of order: every one comes back in its own place, as exact as its group's step allows."""

    class Split(Policy):
        mixed, widths = True, split

    @dataclass(frozen=True, kw_only=True)
    class Both(KVQuant):
        def policy(self, layer):
            return Split(important=0.4, **SMALL)

    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    plain = prefilled(model, inputs)
    with infer_patch.patch(model, Both()):
        cache = prefilled(model, inputs)
    for layer, exact in zip(cache.layers, plain.layers):
        for pool, bits in zip(layer.pools, split):
            for slab in pool.slabs.values():
                groups, numbers = slab.view(), slab.numbers()[0, 0]
                keys, values = dequantise(groups)
                k, v = exact.keys[:, :, numbers], exact.values[:, :, numbers]
                key_step, value_step = groups.key_step.float()[..., None, :], groups.value_step.float()[..., None]
                assert groups.bits == bits
                assert ((keys - k).abs() <= key_step / 2 + 1e-5).all()
                assert ((values - v).abs() <= groups.channel.float()[..., None, :] * value_step / 2 + 1e-5).all()
                spread = k.amax(3) - k.amin(3)  # no wider than the tokens themselves
                assert (groups.key_step.float() * (2**bits - 1) <= spread * 1.01 + 0.01).all()
        together = torch.cat([slab.numbers().flatten() for pool in layer.pools for slab in pool.slabs.values()])
        assert sorted(set(together.tolist())) == list(range(4, 276))


def test_more_bits_are_closer():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,), seed=1)
    more = text_inputs(LLAMA, lengths=(3,), seed=9)["input_ids"]
    expected = continued(model, prefilled(model, inputs), inputs["attention_mask"], more)
    errors = []
    for bits in (8, 4, 2):
        with infer_patch.patch(model, KVQuant(bits=bits, **SMALL)):
            found = continued(model, prefilled(model, inputs), inputs["attention_mask"], more)
        errors.append(float((found - expected).square().mean().sqrt() / expected.std()))
    assert 0 < errors[0] < 0.02  # a 17th of the step of 4 bits, and that a 5th of the step of 2
    assert 5 * errors[0] < errors[1] and 2 * errors[1] < errors[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_caches(dtype):
    model, inputs = LLAMA.build().to(dtype), text_inputs(LLAMA, lengths=(150, 90), seed=1)
    with torch.no_grad(), infer_patch.patch(model, MIXED) as handle:
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        held = handle.report().methods["kv_quant"]["bytes_by_precision"]
    assert all(logits.isfinite().all() for logits in out.logits)
    assert set(held) == {str(dtype).removeprefix("torch."), "4 bits", "2 bits"}


def test_first_layers_in_full_precision():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150,), seed=1)
    with infer_patch.patch(model, KVQuant(bits=2, full_layers=2, **SMALL)):
        cache = prefilled(model, inputs)
    assert [hasattr(layer, "pools") for layer in cache.layers] == [False, False, True, True]


def test_a_patch_put_on_in_mid_conversation_takes_the_cache_over():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150, 90), seed=1)
    more = text_inputs(LLAMA, lengths=(40, 40), seed=9)["input_ids"]
    expected = continued(model, prefilled(model, inputs), inputs["attention_mask"], more)
    cache = prefilled(model, inputs)
    with infer_patch.patch(model, Pools16()):
        torch.testing.assert_close(continued(model, cache, inputs["attention_mask"], more), expected)
    assert all(sum(slab.used[0] for slab in pool.slabs.values()) for pool in cache.layers[0].pools)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"bits": 3}, r"bits must be one of \[2, 4, 8, 16\], got 3"),
        ({"value_bits": 16}, r"value_bits must be one of \[2, 4, 8\], or None for those of keys, got 16"),
        ({"bits": 2, "other_bits": 4, "important": 0.5}, "need at least the bits of others"),
        ({"important": 1.5}, "important must be a share from 0 to 1, got 1.5"),
        ({"window": 100}, "window must be a multiple of 16, got 100"),
        ({"group": 0}, "group must be a multiple of 16, got 0"),
        ({"recent": -1}, "recent must be 0 or more, got -1"),
        ({"recent_probes": 0, "random_probes": 0}, "at least one probe"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        KVQuant(**options)


def test_what_packed_keys_cannot_serve():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150,), seed=1)
    with pytest.raises(ConflictError, match="kv_quant packs keys and values, and envelope has to read them"):
        infer_patch.patch(model, [KVQuant(), Envelope()])
    odd = LLAMA.build(hidden_size=72, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UnsupportedModelError, match="heads of 18 numbers, which do not fill whole bytes of 4"):
        infer_patch.patch(odd, KVQuant(bits=2))
    with infer_patch.patch(model, MIXED):
        cache = prefilled(model, inputs)
        grads = model.get_input_embeddings()(torch.full((1, 1), 9)).detach().requires_grad_()
        with pytest.raises(UnsupportedCallError, match="gradients are wanted, and a quantised cache has none"):
            model(inputs_embeds=grads, past_key_values=cache)
    with pytest.raises(UnsupportedCallError, match="only the patch that made it can read it"):
        model(input_ids=torch.full((1, 1), 9), past_key_values=cache)
    with infer_patch.patch(model, KVQuant(bits=8)), pytest.raises(UnsupportedCallError, match="under another plan"):
        model(input_ids=torch.full((1, 1), 9), past_key_values=cache)


def test_an_empty_cache_that_comes_along_is_filled():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(150,), seed=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), infer_patch.patch(model, MIXED):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 150 and cache.layers[0].nbytes() < 150 * 2 * 2 * 16 * 4
