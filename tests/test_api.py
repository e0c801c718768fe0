"""patch, unpatch and Handle: rules, copies, several models, and what plans refuse."""

import copy
import io
import warnings

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs, vision_inputs
from test_behaviour import last_logits, snapshot

import infer_patch
from infer_patch import PatchError, Plan
from infer_patch.errors import ConflictError, PlanError, UnsupportedModelError
from infer_patch.patches import Envelope, FastV, RandomPruning, SinkWindow

WINDOW = SinkWindow(window=64, evict=True)


@pytest.fixture
def llama():
    return MINIATURES["llama"].build()


@pytest.fixture
def prompt():
    return text_inputs(MINIATURES["llama"], lengths=(300,))


def test_a_second_patch_is_refused_unless_it_replaces(llama, prompt):
    plain = last_logits(llama, prompt)
    first = infer_patch.patch(llama, WINDOW)
    windowed = last_logits(llama, prompt)
    with pytest.raises(PatchError, match=r"patched already, with 'sink_window'.*unpatch\(model\).*replace=True"):
        infer_patch.patch(llama, "identity")
    assert first.active and torch.equal(last_logits(llama, prompt), windowed)
    second = infer_patch.patch(llama, [], replace=True)
    assert second.active and not first.active
    assert torch.equal(last_logits(llama, prompt), plain)
    first.remove()
    assert second.active, "the handle of a replaced patch must not take off its successor"
    infer_patch.unpatch(llama)
    assert not infer_patch.is_patched(llama)


def test_a_refused_replacement_leaves_the_patch_on(llama, prompt):
    handle = infer_patch.patch(llama, WINDOW)
    expected = last_logits(llama, prompt)
    with pytest.raises(UnsupportedModelError):
        infer_patch.patch(llama, FastV(), replace=True)
    assert handle.active
    assert torch.equal(last_logits(llama, prompt), expected)


def test_unpatching_twice(llama, prompt):
    handle = infer_patch.patch(llama, WINDOW)
    last_logits(llama, prompt)
    handle.remove()
    handle.remove()
    with pytest.raises(PatchError, match="is not patched"):
        infer_patch.unpatch(llama)


def test_a_part_of_a_patched_model_is_refused_and_the_other_way_round(llama):
    with infer_patch.patch(llama, []), pytest.raises(PatchError, match="a part of this model"):
        infer_patch.patch(llama.model, [])
    with infer_patch.patch(llama.model, []), pytest.raises(PatchError, match="a part of this model"):
        infer_patch.patch(llama, [])


def test_a_bare_text_model(llama, prompt):
    with torch.no_grad():
        plain = llama.model(**prompt).last_hidden_state
        with infer_patch.patch(llama.model, WINDOW):
            patched = llama.model(**prompt).last_hidden_state
        assert not torch.equal(patched, plain)
        assert torch.equal(llama.model(**prompt).last_hidden_state, plain)


def test_two_models_in_one_process(prompt):
    mini = MINIATURES["llama"]
    window, envelope, plain = mini.build(), mini.build(), mini.build()
    with infer_patch.patch(mini.build(), WINDOW) as handle:
        expected_window = last_logits(handle.model, prompt)
    expected_plain = last_logits(plain, prompt)
    few = Envelope(budget=192, window=64, dense_below=0)
    with infer_patch.patch(window, WINDOW), infer_patch.patch(envelope, few):
        first = last_logits(envelope, prompt)
        assert torch.equal(last_logits(window, prompt), expected_window)
        assert torch.equal(last_logits(plain, prompt), expected_plain)
        assert torch.equal(last_logits(envelope, prompt), first)
    assert torch.equal(last_logits(window, prompt), expected_plain)


def test_models_that_share_a_configuration_object(prompt):
    config = MINIATURES["llama"].config()
    from transformers import LlamaForCausalLM

    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    expected = last_logits(other, prompt)
    with infer_patch.patch(one, WINDOW):
        last_logits(one, prompt)
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(last_logits(other, prompt), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_patched_model_are_patched_models_of_their_own(llama, prompt, how):
    plain = last_logits(llama, prompt)
    handle = infer_patch.patch(llama, WINDOW)
    patched = last_logits(llama, prompt)
    if how == "deepcopy":
        twin = copy.deepcopy(llama)
    else:
        file = io.BytesIO()
        torch.save(llama, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    handle.remove()
    assert torch.equal(last_logits(llama, prompt), plain)
    assert torch.equal(last_logits(twin, prompt), patched)
    infer_patch.unpatch(twin)
    assert torch.equal(last_logits(twin, prompt), plain)
    assert snapshot(twin)[1][0] == snapshot(llama)[1][0]


def test_saving_a_patched_model_saves_the_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "plain")
    with infer_patch.patch(llama, []):
        llama.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_a_method_that_never_fires_warns(llama, prompt):
    with pytest.warns(UserWarning, match="envelope never took effect on llama"), infer_patch.patch(llama, "envelope"):
        last_logits(llama, prompt)


def test_no_warning_when_the_block_fails_or_nothing_ran(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with infer_patch.patch(llama, "envelope"):
            pass
        with pytest.raises(RuntimeError), infer_patch.patch(llama, "envelope"):
            raise RuntimeError


def test_report_counts_what_happened(llama, prompt):
    with infer_patch.patch(llama, SinkWindow(window=128, dense_below=0)) as handle:
        llama.generate(**prompt, max_new_tokens=3, do_sample=False)
        report = handle.report(reset=True)
        figures = report.methods["sink_window"]
        # 5 query blocks of 64: they read 1, 2, 3, 4 and 4 blocks of 1..5; two decode steps read 4 of 5
        assert (figures["blocks_read"], figures["blocks_causal"]) == ((14 + 8) * 2 * 4, (15 + 10) * 2 * 4)
        assert figures["sparse_calls"] == {"prefill": 4, "decode": 8}
        assert report.tokens == {"prefill": 300, "decode": 2} and report.silent == []
        assert report.cache_bytes == 2 * 4 * 302 * 2 * 16 * 4
        assert handle.report().calls == 0
        assert "read 88% of the causal key blocks in 4 layers" in str(report)


def test_report_counts_pruned_tokens_per_picture():
    mini = MINIATURES["llava"]
    model = mini.build()
    with infer_patch.patch(model, FastV(layer=2, drop_ratio=0.75)) as handle:
        model.generate(**vision_inputs(mini, images=(1, 2, 0), gap=0), max_new_tokens=2, do_sample=False)
        figures = handle.report().methods["fastv"]
    assert figures["kept_per_image"] == {2: [[[4, 16]], [[4, 16], [4, 16]], []]}
    assert figures["visual_tokens_kept"] == {2: 12} and figures["visual_tokens"] == {2: 48}


def test_eviction_is_real(llama, prompt):
    with infer_patch.patch(llama, WINDOW) as handle:
        out = llama.generate(**prompt, max_new_tokens=200, do_sample=False, return_dict_in_generate=True)
        held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        assert out.past_key_values.get_seq_length() == 499
        # sinks 64, window 64 reaching back over one block border, a block of margin, and less than a block of slack
        assert max(held) < 64 + 64 + 64 + 64 + 64
        assert handle.report().cache_bytes == sum(2 * layer.keys.numel() * 4 for layer in out.past_key_values.layers)


class TestPlans:
    def test_round_trip_of_every_preset(self):
        for name in infer_patch.presets():
            plan = Plan.preset(name)
            assert Plan.from_yaml(plan.to_yaml()) == plan

    def test_file(self, tmp_path):
        plan = Plan((Envelope(budget=512, layers=(1, 2)), FastV(layer=3)), name="mine")
        plan.save(tmp_path / "mine.yaml")
        assert Plan.of(tmp_path / "mine.yaml") == Plan.of(str(tmp_path / "mine.yaml")) == plan

    @pytest.mark.parametrize(
        "text, complaint",
        [
            ("methods: [{method: hipp}]", "unknown method 'hipp'; known methods: .*envelope"),
            ("methods: [{method: envelope, bugdet: 1}]", "envelope has no option bugdet; its options: .*budget"),
            ("methods: [{method: envelope, budget: 100}]", "budget must be a multiple of 64 .*got 100"),
            ("methods: [{method: fastv, drop_ratio: 1}]", "drop_ratio must be at least 0 and below 1, got 1"),
            ("methods: [{method: sink_window, window: 1}]", "window must be at least 64 tokens, got 1"),
            ("methods: [{method: sink_window, layers: [-1]}]", "layers must be layer numbers from 0 up"),
            ("methods: {}", "a list `methods:`"),
            ("plans: []", "got also plans"),
            ("methods: [", "not valid YAML"),
            ("methods: [!!python/object/apply:os.getcwd []]", "not valid YAML"),
        ],
    )
    def test_mistakes_are_named(self, text, complaint):
        with pytest.raises(PlanError, match=complaint):
            Plan.from_yaml(text)

    def test_unknown_preset_and_strange_plans(self, llama):
        with pytest.raises(PlanError, match=r"unknown preset 'hop'; presets: .*envelope"):
            infer_patch.patch(llama, "hop")
        with pytest.raises(PlanError, match="cannot make a plan of 3"):
            infer_patch.patch(llama, 3)
        with pytest.raises(PlanError, match=r"cannot read the plan file nowhere\.yaml"):
            infer_patch.patch(llama, "nowhere.yaml")

    def test_conflicts_name_methods_and_layers(self, llama):
        with pytest.raises(
            ConflictError, match=r"sink_window and envelope both act on layers 0-3.*selected by one method"
        ):
            infer_patch.patch(llama, SinkWindow(), Envelope())
        with pytest.raises(ConflictError, match=r"layers 2:.*kept in one way"):
            infer_patch.patch(llama, SinkWindow(evict=True, layers=(0, 2)), SinkWindow(evict=True, layers=(2, 3)))
        assert not infer_patch.is_patched(llama)

    def test_methods_on_different_layers_compose(self, llama, prompt):
        with infer_patch.patch(
            llama,
            SinkWindow(window=64, evict=True, layers=(0, 2)),
            Envelope(budget=192, window=64, dense_below=0, layers=(1, 3)),
        ) as handle:
            llama.generate(**prompt, **GREEDY)
            report = handle.report()
        assert report.silent == []
        assert list(report.methods["sink_window"]["share_read"]) == [0, 2]
        assert list(report.methods["envelope"]["share_read"]) == [1, 3]

    def test_layers_that_are_not_there(self, llama):
        with pytest.raises(UnsupportedModelError, match=r"layers \[7\] of llama .* layers 0-3 only"):
            infer_patch.patch(llama, SinkWindow(layers=(1, 7)))
        with pytest.raises(PlanError, match="layer 9 of a model with 4 layers"):
            infer_patch.patch(MINIATURES["llava"].build(), RandomPruning(layer=9))
