import json
import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infer_patch.errors import PatchError
from infer_patch.evals import haystack, prose
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.haystack import Needle, build_haystack
from infer_patch.evals.needle import NeedleGrid, grid, rouge1_f
from infer_patch.patches import SinkWindow
from infer_patch.plan import Plan

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{{ '<s>assistant\n' }}"


@pytest.fixture(scope="module", params=["chat", "plain"])
def tokenizer(request):
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    stream = prose.paragraphs(random.Random(0))
    text = [" ".join(next(stream)) for _ in range(60)] + ["0 1 2 3 4 5 6 7 8 9 \n\n"]
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"]))
    template = TEMPLATE if request.param == "chat" else None
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=template)


def model(limit=None):
    config = SimpleNamespace(max_position_embeddings=limit)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


def scored(task, items, outputs):
    """Rows as `metrics` sees them, after a way through JSON."""
    rows = [
        {"item": i.name, "group": i.group, "reference": i.reference, "facts": i.facts, "score": task.score(i, output)}
        for i, output in zip(items, outputs)
    ]
    return json.loads(json.dumps(rows))


def test_items(tokenizer):
    task = NeedleGrid(lengths=(300, 900), repeats=2)
    items = task.items(tokenizer, model(1000))
    assert len(items) == 20 and items == task.items(tokenizer, model())
    assert items[4].name == "300 tokens, 50 %, 0"
    for values in ([i.name for i in items], [i.group for i in items], [i.reference for i in items]):
        assert len(set(values)) == 20
    assert len({i.prompt.text[200:600] for i in items}) == 20
    for item in items:
        text, facts = item.prompt.text, item.facts
        assert 0.95 * facts["length"] <= len(item.prompt.input_ids) <= facts["length"]
        assert text.count(facts["needle"]) == text.count(item.reference) == 1
        assert item.prompt.text.endswith("mentioned in the text is")
        assert ("<s>assistant\n" in text) == bool(tokenizer.chat_template)
        body = text[: text.rindex("What is the special")]
        place = body.index(facts["needle"]) / (len(body) - len(facts["needle"]))
        assert abs(place - facts["depth"]) < 0.15


def test_an_item_depends_on_its_own_place_only(tokenizer):
    items = NeedleGrid(lengths=(300, 400), depths=(0.1, 0.5), repeats=2).items(tokenizer, model())
    assert NeedleGrid(lengths=(400,), depths=(0.5,)).items(tokenizer, model()) == [items[6]]
    other = NeedleGrid(lengths=(400,), depths=(0.5,), seed=1).items(tokenizer, model())
    assert other[0].reference != items[6].reference


def test_answer_prefix_can_be_left_out(tokenizer):
    item = NeedleGrid(lengths=(400,), depths=(0.5,), answer_prefix=False).items(tokenizer, model())[0]
    assert item.prompt.text.endswith("<s>assistant\n" if tokenizer.chat_template else "in the text is")


def test_texts_of_ones_own(tokenizer, tmp_path):
    task = NeedleGrid(lengths=(500,), depths=(0.0, 0.5), repeats=3, text_folder=tmp_path)
    with pytest.raises(PatchError, match=r"holds no \.txt files"):
        task.items(tokenizer, model())
    text = build_haystack(tokenizer, 3000, seed=9)
    (tmp_path / "b.txt").write_text(text[5000:])
    (tmp_path / "a.txt").write_text(text[:5000].replace(".", " of 1748."))
    items = task.items(tokenizer, model())
    assert any("of 1748." in item.prompt.text for item in items)
    assert len({item.prompt.text[:400] for item in items}) > 3
    for item in items:
        assert item.prompt.text.count(item.reference) == 1 and len(item.prompt.input_ids) <= 500
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(PatchError, match="UTF-8"):
        task.items(tokenizer, model())


def test_a_number_that_the_text_holds_already_is_drawn_again(tokenizer, tmp_path, monkeypatch):
    task = NeedleGrid(lengths=(500,), depths=(0.5,), text_folder=tmp_path)
    text = build_haystack(tokenizer, 1000)
    (tmp_path / "a.txt").write_text(text)
    first = task.items(tokenizer, model())[0].reference
    (tmp_path / "a.txt").write_text(text.replace(".", f" of {first}."))
    assert task.items(tokenizer, model())[0].reference != first
    monkeypatch.setattr(haystack, "make_needle", lambda seed: Needle("", first, f"It is {first}.", "What?", "It is"))
    with pytest.raises(PatchError, match="give texts with fewer digits"):
        task.items(tokenizer, model())


def test_refusals_come_first(tokenizer):
    assert NeedleGrid(lengths=(500,)).items(tokenizer, model(512))
    with pytest.raises(PatchError, match=r"needs 512 tokens, max_new_tokens=12 included; this model takes 511"):
        NeedleGrid(lengths=(100, 500)).items(tokenizer, model(511))
    with pytest.raises(PatchError, match="leaves no room"):
        NeedleGrid(lengths=(20,)).items(tokenizer, model())
    for wrong, message in [
        ({"lengths": ()}, "at least one value"),
        ({"depths": (0.5, 0.5)}, "each given once"),
        ({"depths": (50.0,)}, "0.5 is the middle"),
        ({"repeats": 0}, "got 0 and 12"),
    ]:
        with pytest.raises(PatchError, match=message):
            NeedleGrid(**wrong)


def test_scores_and_metrics(tokenizer):
    task = NeedleGrid(lengths=(300, 400), depths=(0.0, 0.5))
    items = task.items(tokenizer, model())
    perfect = scored(task, items, [f" {i.reference}.\n" for i in items])
    assert task.metrics(perfect) == dict.fromkeys(
        ["accuracy", "length 300", "length 400", "depth 0.0", "depth 0.5"], 1.0
    )
    assert task.metrics(scored(task, items, [""] * 4))["accuracy"] == 0
    outputs = [items[0].reference, "no idea", items[2].reference, items[3].reference[:4]]
    rows = scored(task, items, outputs)
    assert task.metrics(rows) == {
        "accuracy": 0.5,
        "length 300": 0.5,
        "length 400": 0.5,
        "depth 0.0": 1.0,
        "depth 0.5": 0.0,
    }
    assert task.grid(rows)[1] == [[1.0, 1.0], [0.0, 0.0]]
    assert task.grid(rows)[0]["y"] == ["0 %", "50 %"]
    assert grid(rows[:1] + rows[2:], (300, 400, 500), (0.5, 0.0)) == [[None, 0.0, None], [1.0, 1.0, None]]
    assert task.score(items[0], items[0].facts["needle"])["rouge1_f"] == 1


def test_rouge():
    assert rouge1_f("It is: 17.", "it is 17") == 1
    assert rouge1_f("the the cat", "the dog") == pytest.approx(2 * 1 / 5)
    assert rouge1_f("", "the dog") == rouge1_f("", "") == 0


def test_evaluate_takes_it(tiny):
    plan = Plan((SinkWindow(window=64, evict=True, dense_below=0),), "window")
    found = evaluate(*tiny, NeedleGrid(lengths=(700,), depths=(0.0, 1.0), max_new_tokens=2), [plan], batch_size=2)
    assert len(found.samples) == 6 and found.summary["rows"][0]["metrics"]["accuracy"] == 0
    assert found.summary["grids"]["window"] == [[0.0], [0.0]]
