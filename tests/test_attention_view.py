"""Attention measured through the values, against eager attention and against what each method promises."""

import io
import json
from dataclasses import dataclass

import pytest
import torch
from miniatures import IMAGE, MINIATURES, text_inputs, vision_inputs
from typer.testing import CliRunner

import infer_patch
from infer_patch.cache import IndexedLayer
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.evals.attention_view import head_attention
from infer_patch.evals.compare import Settings, compare
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.method import Method, Runtime
from infer_patch.patches import Envelope, FastV, HiP, RetrievalHeads, SinkWindow
from infer_patch.plan import Plan
from infer_patch.report.attention_pictures import Seen, binned, changes, drawn, moved
from infer_patch.report.page import write_page
from infer_patch.visual_grid import Grid


class PackedLayer(IndexedLayer):
    """A cache that attends itself, to what it holds and not to the values that it hands on."""

    attends = True

    def attention(self, inputs, mask):
        return dense_attention(inputs.q, self.keys, self.values, inputs.scale).transpose(1, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class Packed(Method):
    name = "packed"
    ports = ("store",)

    def runtime(self, parts, layers):
        runtime = Runtime(self, parts, layers)
        runtime.cache_layer = lambda layer: PackedLayer()
        return runtime


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3", "llava"])
def test_unpatched_attention_is_that_of_eager_attention(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1,)) if mini.kind == "vision" else text_inputs(mini, lengths=(45,))
    model = mini.build()
    out = mini.build(attn_implementation="eager")(**inputs, output_attentions=True)
    for layer, head in ((0, 0), (1, 3), (3, 2)):
        expected = out.attentions[layer][0, head]
        torch.testing.assert_close(head_attention(model, None, inputs, layer, head), expected, atol=1e-5, rtol=1e-4)
        same = head_attention(model, Plan((RetrievalHeads(heads=("2-1",)),)), inputs, min(layer, 1), head)
        torch.testing.assert_close(same, out.attentions[min(layer, 1)][0, head], atol=1e-5, rtol=1e-4)


def test_masked_heads_are_seen_to_be_uniform():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(45,))
    uniform = torch.ones(45, 45).tril() / torch.arange(1, 46)[:, None]
    every = head_attention(model, Plan((RetrievalHeads(heads=("1-2",), phase="all"),)), inputs, 1, 2)
    torch.testing.assert_close(every, uniform)
    last = head_attention(model, Plan((RetrievalHeads(heads=("1-2",)),)), inputs, 1, 2)
    before = head_attention(model, None, inputs, 1, 2)
    torch.testing.assert_close(last[-1], uniform[-1])
    torch.testing.assert_close(last[:-1], before[:-1])
    assert (head_attention(model, Plan((RetrievalHeads(heads=("1-2",), mode="zero"),)), inputs, 1, 2)[-1] == 0).all()


def test_sparse_attention_is_seen_to_skip_what_it_skips():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(400,))
    dense = head_attention(model, None, inputs, 2, 1)
    narrow = SinkWindow(sinks=64, window=64, dense_below=0, layers=(2,))
    sparse = head_attention(model, Plan((narrow,)), inputs, 2, 1)
    torch.testing.assert_close(sparse.sum(1), torch.ones(400))
    assert (sparse[399, 64:320] == 0).all() and (dense[399, 64:320] > 0).all()
    seen = sparse > 0
    torch.testing.assert_close(sparse, dense * seen / (dense * seen).sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_dropped_tokens_have_no_attention():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    visual = inputs["input_ids"][0] == IMAGE
    plan = Plan((FastV(layer=2, drop_ratio=0.5),))
    below, above = (head_attention(model, plan, inputs, layer, 0) for layer in (1, 3))
    assert (below[-1] > 0).all()
    gone = above.sum(0) == 0
    assert int(gone.sum()) == int(visual.sum()) // 2 and not (gone & ~visual).any()
    torch.testing.assert_close(above.sum(1), (~gone).float())


@pytest.mark.parametrize(
    "method",
    [
        Envelope(budget=192, window=64, dense_below=0),
        RetrievalHeads(heads=("1-2", "2-0")),
        HiP(budget=16, tree_block=16, window=68, refresh=4, sinks=0, dense_layers=0, dense_below=0, max_share=1.0),
    ],
    ids=lambda m: m.name,
)
def test_looking_changes_nothing(method):
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(300,))
    seen = []
    with infer_patch.patch(model, method), torch.no_grad():
        expected = model(**inputs)
    hook = model.register_forward_hook(lambda m, args, out: seen.append(out))
    found = head_attention(model, Plan((method,)), inputs, 1, 2)
    hook.remove()
    torch.testing.assert_close(found.sum(1), torch.ones(300))
    assert torch.equal(seen[0].logits, expected.logits)
    held, plain = seen[0].past_key_values.layers[1], expected.past_key_values.layers[1]
    assert torch.equal(held.values, plain.values)
    for key, state in plain.state.items():
        assert len(state) == len(held.state[key])
        sums = [[x for v in s.values() for x in (v if isinstance(v, tuple) else ())] for s in (state, held.state[key])]
        assert all(torch.equal(a, b) for a, b in zip(*sums) if isinstance(a, torch.Tensor))
    assert not infer_patch.is_patched(model)


def test_what_cannot_be_seen_says_why():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(300,))
    with pytest.raises(PatchError, match="no layer 4 in llama: it has 4"):
        head_attention(model, None, inputs, 4, 0)
    with pytest.raises(PatchError, match="no head 9"):
        compare(model, None, ["identity"], ["x"], Settings(attention=(0, 9)))
    found = head_attention(model, Plan((Packed(layers=(1,)),)), inputs, 1, 0)
    assert isinstance(found, str) and "cache of its own" in found
    assert isinstance(head_attention(model, Plan((Packed(layers=(1,)),)), inputs, 2, 0), torch.Tensor)


def test_small_drawings_keep_the_mass():
    matrix = torch.rand(500, 500, generator=torch.Generator().manual_seed(0)).tril()
    matrix /= matrix.sum(1, keepdim=True)
    small = binned(matrix, 160)
    assert small.shape == (160, 160)
    torch.testing.assert_close(small.sum(1), torch.ones(160))
    torch.testing.assert_close(binned(matrix[:50, :50], 160), matrix[:50, :50])


def test_what_moved_and_where():
    before = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    after = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.6, 0.2]])
    assert moved(before, after) == pytest.approx((0.1, 0.3))
    found = changes(before, after, ["a", "b", "c"])
    assert [change["token"] for change in found] == [1, 2] and found[0]["after"] == pytest.approx(0.6)
    assert changes(before, before, ["a", "b", "c"]) == []
    assert drawn(before, after).startswith(b"\x89PNG")


def test_the_page_of_a_comparison_shows_it(folder, tmp_path):
    plan = tmp_path / "masked.yaml"
    plan.write_text('name: masked\nmethods:\n- {method: retrieval_heads, heads: ["1-2"], phase: all}\n')
    out = tmp_path / "result"
    asked = ["--prompt", "<i>A word.</i> " * 12, "--max-new-tokens", "2", "--rounds", "1", "--attention", "1:2"]
    command = ["compare", str(folder), "--plan", str(plan), "--plan", "identity", *asked, "--out", str(out)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    views = json.loads((out / "summary.json").read_text())["attention"]
    assert [view["plan"] for view in views] == ["masked", "identity"]
    assert views[0]["moved"] > 0.01 and views[0]["changes"] and views[1]["moved"] == 0 and not views[1]["changes"]
    assert (out / "attention" / "masked.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "Layer 1, head 2" in page and page.count("data:image/png") == 2 and "<i>A" not in page
    assert write_page(out).read_text() == page
    for wrong, words in (("12", "LAYER:HEAD"), ("9:0", "no layer 9")):
        ran = CliRunner().invoke(app, [*command[:-3], wrong, "--out", str(tmp_path / "other")])
        assert ran.exit_code == 2 and words in ran.output and not (tmp_path / "other").exists()


def test_what_the_last_token_reads_is_drawn_over_the_picture():
    from PIL import Image

    rows = torch.rand(9, 9).tril()
    rows = rows / rows.sum(1, keepdim=True)
    seen = Seen(Image.new("RGB", (30, 20), "red"), Grid(2, 3), torch.arange(1, 7))
    plain, both = (Image.open(io.BytesIO(drawn(rows, rows.flip(1), extra))) for extra in (None, seen))
    assert plain.width == both.width and both.height > 1.5 * plain.height


def test_the_picture_of_a_prompt_is_found_with_its_grid():
    from PIL import Image

    from infer_patch.demo_vlm import load_demo_vlm
    from infer_patch.evals.attention_view import _first_picture
    from infer_patch.evals.prompts import Prompt, encode

    model, processor = load_demo_vlm(torch.float32)
    picture = Image.new("RGB", (64, 64), "red")
    inputs = encode(Prompt("is there a red circle?", images=(picture,)), processor, model)
    seen = _first_picture(model, processor, inputs, [picture])
    assert seen is not None and seen.grid.tokens == len(seen.places) == 256
    assert int(inputs["input_ids"][0, seen.places].unique()) == model.config.image_token_id
    assert _first_picture(model, processor, inputs, []) is None
