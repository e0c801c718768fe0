"""What is recorded from vision encoders: against eager attention, on every family, and only for the right call."""

import copy
import inspect

import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, VIDEO, vision_inputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vision_references import token_scores

import infer_patch
from infer_patch.errors import UnsupportedCallError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.patches import VTCCLS
from infer_patch.vision_layout import NEWLINE, window_order
from infer_patch.vision_scores import _sample_order
from infer_patch.vision_tower import TowerCall, cls_attention, find_vision_tower, received_attention

VISION = [name for name, mini in MINIATURES.items() if mini.kind == "vision"]
AHEAD = "mm_encoder_outputs"  # transformers that encode pictures ahead of the forward take this argument


def recorded(model, run, method=None):
    """Scores, tiles and picture numbers that the method saw while `run(model)` ran, call by call."""
    with infer_patch.patch(model, method or VTCCLS(drop_ratio=0.5)) as handle:
        runtime = handle._engine.methods[0][2]
        kept, calls = runtime._kept, []

        def stash(seen, image):
            calls.append((seen.values[runtime, "score"], seen.tile, image))
            return kept(seen, image)

        runtime._kept = stash
        with torch.no_grad():
            run(model)
    return calls


def check(calls, family, model, inputs, blocks):
    (scores, tile, image), *_ = calls
    expected = iter(token_scores(family, model, inputs, blocks))
    for sample in range(len(image)):
        for picture in range(int(image[sample].max()) + 1):
            here = image[sample] == picture
            for score, number, plain in zip(scores[sample, here].tolist(), tile[sample, here].tolist(), next(expected)):
                assert (number == NEWLINE) == (plain is None)
                assert plain is None or score == pytest.approx(plain, abs=1e-5)
    assert next(expected, None) is None
    assert scores[image < 0].isnan().all()


@pytest.mark.parametrize("family", [name for name in VISION if name != "llava_onevision"])  # whose tiles are below
def test_scores_are_those_of_eager_attention(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1, 2, 0), seed=4)
    model = mini.build()
    blocks = {"clip_vision_model": [0, 1]}.get(mini.vision.get("model_type"), [0, 1, 2])
    blocks = [1] if family == "qwen2_5_vl" else blocks  # the one block that sees the whole picture
    eager = mini.build(attn_implementation="eager")
    check(recorded(model, lambda m: m(**inputs)), family, eager, inputs, blocks)
    check(recorded(model, lambda m: m.generate(**inputs, **GREEDY)), family, eager, inputs, blocks)


@pytest.mark.parametrize("images, layout", [((1,), "tiles"), ((2,), "base")])
def test_tiles_and_newlines_of_onevision(images, layout):
    mini = MINIATURES["llava_onevision"]
    inputs, model = vision_inputs(mini, images=images), mini.build()
    ((scores, tile, image),) = recorded(model, lambda m: m(**inputs))
    eager = mini.build(attn_implementation="eager")
    pixels = inputs["pixel_values"].flatten(0, 1) if layout == "tiles" else inputs["pixel_values"][:, 0]
    attentions = eager.model.vision_tower(pixels, output_attentions=True).attentions
    plain = sum(a.mean((1, 2)) for a in attentions)
    for picture in range(images[0]):
        here = image[0] == picture
        if layout == "tiles":
            assert tile[0, here].tolist() == [0] * 4 + [1, 1, 2, 2, NEWLINE] * 2
            order = torch.cat([plain[0], plain[1, :2], plain[2, :2], plain[1, 2:], plain[2, 2:]])
        else:
            assert tile[0, here].tolist() == [0] * 4 + [NEWLINE]
            order = plain[picture]
        found = scores[0, here]
        torch.testing.assert_close(found[~found.isnan()], order, atol=1e-5, rtol=1e-5)


def test_padded_parts_of_a_picture_are_looked_at_by_nobody():
    mini = MINIATURES["idefics3"]
    inputs, model = vision_inputs(mini, images=(1,)), mini.build()
    inputs["pixel_attention_mask"][:, :, :, 16:] = False  # the right half
    ((scores, _, image),) = recorded(model, lambda m: m(**inputs))
    grid = scores[image >= 0].view(4, 4)
    assert (grid[:, 2:] == 0).all() and (grid[:, :2] > 0).all()
    assert grid.sum() * 4 == pytest.approx(3)  # three blocks; what a patch gives away sums to 1; 4 patches a token


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl"])
def test_beams_see_the_scores_of_their_sample(family):
    mini = MINIATURES[family]
    model = mini.build()
    many = AHEAD in mini.accepts or family.startswith("qwen")  # others repeat pictures one by one: [a, a, b, b]
    inputs = vision_inputs(mini, images=(1, 2, 1) if many else (1, 1, 1), seed=2)
    (plain,) = recorded(model, lambda m: m(**inputs))
    (beams, *_) = recorded(model, lambda m: m.generate(**inputs, **GREEDY, num_beams=2))
    for found, expected in zip(beams, plain):
        torch.testing.assert_close(found, expected.repeat_interleave(2, 0), equal_nan=True)


def test_order_of_samples_under_beams_and_counts_that_do_not_fit():
    assert _sample_order([2, 3], 5, "image").tolist() == [0, 1, 2, 3, 4]
    assert _sample_order([2, 2, 0, 0, 3, 3], 5, "image").tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    for counts, encoded in (([2, 3], 4), ([2, 3, 2, 3], 5), ([1], 0)):
        with pytest.raises(UnsupportedCallError, match="each picture once"):
            _sample_order(counts, encoded, "image")


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl"])
def test_scores_never_go_to_another_picture(family):
    mini = MINIATURES[family]
    model = mini.build()
    one, other = (vision_inputs(mini, images=(1,), seed=seed) for seed in (1, 2))
    (expected,) = recorded(model, lambda m: m(**one))

    def interrupted(m):
        m.model.get_image_features(**{k: v for k, v in other.items() if k in takes})
        m(**other)
        m(**one)

    takes = inspect.signature(model.model.get_image_features).parameters
    first, second = recorded(model, interrupted)
    torch.testing.assert_close(second[0], expected[0], equal_nan=True)
    assert not torch.equal(first[0].nan_to_num(), second[0].nan_to_num())
    if AHEAD not in inspect.signature(model.forward).parameters:
        return

    def crossed(m):
        outputs = [m.model.get_image_features(**{k: v for k, v in x.items() if k in takes}) for x in (one, other)]
        rest = {k: v for k, v in one.items() if k not in takes}
        m(**rest, **{AHEAD: {"image": outputs[0]}}, **{k: v for k, v in one.items() if k == "image_grid_thw"})

    (found,) = recorded(model, crossed)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)


def test_visual_tokens_whose_pictures_were_not_seen_are_refused():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    ids = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with infer_patch.patch(model, VTCCLS()):
        model(**inputs)
        with pytest.raises(UnsupportedCallError, match="vtc_cls must see pictures being encoded"):
            model(**ids)
        if AHEAD in inspect.signature(model.forward).parameters:
            with pytest.raises(UnsupportedCallError, match="encoded before the patch"):
                model(**ids, **{AHEAD: {"image": features}})
            with pytest.raises(UnsupportedCallError, match="a chunk of a prompt"):
                model.generate(**inputs, **GREEDY, prefill_chunk_size=8)
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("family", VISION)
def test_features_and_hidden_states_of_the_encoder_do_not_change(family):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2), seed=3)
    method = model.model.get_image_features
    given = {k: v for k, v in inputs.items() if k in inspect.signature(method).parameters}
    plain = model.model.get_image_features(**given, return_dict=True)
    with infer_patch.patch(model, VTCCLS()):
        assert inspect.signature(model.model.get_image_features) == inspect.signature(method)
        patched = model.model.get_image_features(**given, return_dict=True)
    assert list(plain.keys()) == list(patched.keys())
    for a, b in zip(plain.pooler_output, patched.pooler_output):
        assert torch.equal(a, b)
    if family in ("llava", "llava_next"):  # the last block is left out: features come from the one before it
        assert torch.equal(plain.hidden_states[-2], patched.last_hidden_state)
        assert len(plain.hidden_states) == len(patched.hidden_states)
        for a, b in zip(plain.hidden_states[:-1], patched.hidden_states[:-1]):
            assert b is None if a is None else torch.equal(a, b)  # newer transformers keep what is asked for only
    else:
        assert torch.equal(plain.last_hidden_state, patched.last_hidden_state)
    assert "get_image_features" not in vars(model.model)
    blocks = find_vision_tower(describe(model)).modules
    assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("layer, unused", [(-1, 0), (-2, 1), (1, 2), ([1, 2], 1)])
def test_blocks_behind_the_features_do_not_run(layer, unused):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2), seed=3)
    model.config.vision_feature_layer = layer
    if isinstance(layer, list):  # features of both layers side by side
        first = model.model.multi_modal_projector.linear_1
        model.model.multi_modal_projector.linear_1 = nn.Linear(2 * first.in_features, first.out_features)
    ran = []
    for number, block in enumerate(find_vision_tower(describe(model)).modules):
        block.mlp.register_forward_hook(lambda m, a, o, number=number: ran.append(number))
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]  # rows of padding hold anything
        assert ran == [0, 1, 2]
        ran.clear()
        with infer_patch.patch(model, VTCCLS(tokens=999)):
            assert torch.equal(model(**inputs).logits[:, -1], expected)
            assert ran == [0, 1, 2][: 3 - unused]
            ran.clear()
            model.generate(**inputs, **GREEDY)
            assert ran == [0, 1, 2][: 3 - unused]
            ran.clear()
            with infer_patch.patch(mini.build(), VTCCLS()):  # of another model: this one is not concerned
                model.model.vision_tower(inputs["pixel_values"])
            assert ran == [0, 1, 2]  # asked directly, the encoder is whole


def test_a_block_with_a_forward_of_its_own_runs():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,), seed=3)
    blocks, ran = find_vision_tower(describe(model)).modules, []
    blocks[-1].mlp.register_forward_hook(lambda m, a, o: ran.append(1))
    blocks[-1].forward = blocks[-1].forward  # accelerate fetches weights in one
    with infer_patch.patch(model, VTCCLS()), torch.no_grad():
        model(**inputs)
    assert ran == [1]


def test_copies_of_a_patched_model_record_for_themselves():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    with infer_patch.patch(model, VTCCLS()) as handle:
        twin = copy.deepcopy(model)
        expected = model(**inputs).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits, expected)
    assert twin._infer_patch_handle.report().methods["vtc_cls"]["fired"]
    infer_patch.unpatch(twin)
    assert not handle.active and not infer_patch.is_patched(twin)


def test_windows_of_qwen_are_those_of_transformers():
    mini = MINIATURES["qwen2_5_vl"]
    grids = torch.tensor([[1, 4, 8], [2, 6, 10], [1, 2, 2]])
    visual = mini.build().model.visual
    if hasattr(visual, "get_window_index"):
        expected = visual.get_window_index(grids)[0]
    else:
        from transformers.vision_utils import get_vision_window_index

        expected = get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)[0]
    assert torch.equal(window_order(grids, 2, 2), torch.as_tensor(expected))


def random_call(heads=4, n=9, leading=1, mask=None, batch=2):
    q, k = (torch.randn(batch, heads, n, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    return TowerCall(q, k, 8**-0.5, mask, leading, has_cls=leading > 0)


def test_rows_of_the_cls_token_and_columns_without_one(monkeypatch):
    call = random_call()
    probabilities = (call.q @ call.k.transpose(-1, -2) * call.scale).softmax(-1)
    torch.testing.assert_close(cls_attention(call), probabilities.mean(1)[:, 0])
    torch.testing.assert_close(received_attention(call), probabilities.mean((1, 2)))
    assert (cls_attention(call)[:, 1:].sum(1) < 1).all() and (cls_attention(call) >= 0).all()
    monkeypatch.setattr("infer_patch.vision_tower._SCORES_AT_ONCE", 2 * 4 * 9 * 2)  # two queries at a time
    torch.testing.assert_close(received_attention(call), probabilities.mean((1, 2)))
    order = torch.randperm(4)
    mixed = TowerCall(call.q[:, order], call.k[:, order], call.scale, None, 1, True)
    torch.testing.assert_close(cls_attention(mixed), cls_attention(call))
    moved = TowerCall(call.q, call.k + torch.randn(2, 4, 1, 8), call.scale, None, 1, True)  # a constant per head
    torch.testing.assert_close(cls_attention(moved), cls_attention(call))


@pytest.mark.parametrize("leading, rows", [(1, 128), (1, 2), (5, 3), (0, 128)])
def test_what_patches_alone_look_at(leading, rows, monkeypatch):
    monkeypatch.setattr("infer_patch.vision_tower._ROWS_AT_ONCE", rows)
    call = random_call(leading=leading)
    q, k = call.q.double(), call.k.double()
    expected = (q @ k.transpose(-1, -2) * call.scale).softmax(-1)[:, :, leading:].mean((1, 2)).float()
    torch.testing.assert_close(received_attention(call, by_patches=True), expected)
    assert (received_attention(call) - expected).abs().max() > 0.005 or not leading


def test_received_attention_holds_a_slice_of_rows():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numbers = max(self.numbers, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Largest() as largest:
        received_attention(random_call(heads=4, n=577, batch=1), by_patches=True)
    assert largest.numbers == 4 * 128 * 577


@pytest.mark.parametrize("kind", ["2-D", "bool", "additive"])
def test_masked_patches_neither_look_nor_are_looked_at(kind):
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    four = valid[:, None, None].expand(2, 1, 9, 9)
    floor = torch.finfo(torch.float32).min
    mask = {"2-D": valid, "bool": four, "additive": torch.zeros(2, 1, 9, 9).masked_fill(~four, floor)}[kind]
    call = random_call(mask=mask)
    short = TowerCall(call.q[1:, :, :6], call.k[1:, :, :6], call.scale, None, 1, True)
    for look in (cls_attention, received_attention):
        torch.testing.assert_close(look(call)[1, :6], look(short)[0])
        assert (look(call)[1, 6:] == 0).all()


def test_feature_layers_and_blocks():
    tower = find_vision_tower(describe(MINIATURES["llava"].build()))
    assert (tower.blocks, tower.leading, tower.has_cls) == (3, 1, True)
    assert [tower.feature_block(x) for x in (-1, -2, -3, 1, 3, [-2, -3], None)] == [2, 1, 0, 0, 2, 1, 2]
    assert tower.last_blocks(7, 1) == (0, 1) and tower.last_blocks(1, 2) == (2,)
    assert find_vision_tower(describe(MINIATURES["qwen2_5_vl"].build())).whole == (1,)
    assert not find_vision_tower(describe(MINIATURES["llava_onevision"].build())).has_cls


def test_registers_are_no_patches():
    model = MINIATURES["llava"].build()
    model.model.vision_tower.register_tokens = nn.Parameter(torch.zeros(1, 4, 32))
    assert find_vision_tower(describe(model)).leading == 5


def test_towers_that_are_not_understood():
    model = MINIATURES["llava"].build()
    model.model.projector_qformer = type("TinyQFormer", (nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match="resamples its pictures"):
        infer_patch.patch(model, VTCCLS())
    model = MINIATURES["llava"].build()
    model.model.second = copy.deepcopy(model.model.vision_tower)
    with pytest.raises(UnsupportedModelError, match=r"found vision_tower.*second"):
        infer_patch.patch(model, VTCCLS())
    with pytest.raises(UnsupportedModelError, match="llama has none"):
        infer_patch.patch(MINIATURES["llama"].build(), VTCCLS())
    assert IMAGE in describe(MINIATURES["llava"].build()).image_token_ids


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_seen_as_their_frames_are(family):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2))
    video = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    video["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VIDEO)
    video |= {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
    if "mm_token_type_ids" in video:
        video["mm_token_type_ids"] = 2 * inputs["mm_token_type_ids"]
    (expected,) = recorded(model, lambda m: m(**inputs))
    (found,) = recorded(model, lambda m: m(**video))
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    (ahead, *_) = recorded(model, lambda m: m.generate(**video, **GREEDY))
    torch.testing.assert_close(ahead[0], expected[0], equal_nan=True)
