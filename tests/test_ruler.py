import json
import random
import re
import uuid
from collections import Counter
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infer_patch.errors import PatchError
from infer_patch.evals import prose, ruler_tasks
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.haystack import build_haystack
from infer_patch.evals.ruler import Ruler, post_process, string_match_all, string_match_part
from infer_patch.evals.ruler_tasks import NEW_TOKENS, TASKS
from infer_patch.plan import Plan

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{{ '<s>assistant\n' }}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One special magic (number|uuid) for (\S+) is: (\S+)\.")
NIAH = [task for task in TASKS if task.startswith("niah")]
LENGTHS = (2400, 5000)


def trained(template):
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    stream, rng = prose.paragraphs(random.Random(0)), random.Random(0)
    text = [" ".join(next(stream)) for _ in range(60)]
    text += [
        " ".join([*ruler_tasks.ADJECTIVES, *ruler_tasks.NOUNS]),
        " ".join(str(uuid.UUID(int=rng.getrandbits(128)))),
    ]
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1600, special_tokens=["<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=template)


@pytest.fixture(scope="module")
def tokenizer():
    return trained(TEMPLATE)


@pytest.fixture(scope="module")
def items(tokenizer):
    return Ruler(lengths=LENGTHS, samples=3).items(tokenizer, model())


def model(limit=None):
    config = SimpleNamespace(max_position_embeddings=limit)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


def of(items, *tasks):
    return [item for item in items if item.facts["task"] in tasks]


def context(item):
    """What stands between the last instruction and the last question."""
    user = item.prompt.text.split("</s>\n<s>assistant\n")[0]
    assert len(user.split("\n\n")) >= 3
    start = re.compile(r"(?:The text below holds|Below is a|Follow the variable)[^\n]*\n\n")
    last = list(start.finditer(user))[-1]
    return user[last.end() : user.rindex("\n\n")]


def question(item):
    return item.prompt.text.split("</s>\n<s>assistant\n")[0].rsplit("\n\n", 1)[1]


def scored(task, items, outputs):
    rows = [
        {"item": i.name, "group": i.group, "reference": i.reference, "facts": i.facts, "score": task.score(i, output)}
        for i, output in zip(items, outputs)
    ]
    return json.loads(json.dumps(rows))


def test_names_budgets_and_order(items, tokenizer):
    assert Ruler().max_new_tokens == 128 and Ruler(tasks=("vt", "fwe")).max_new_tokens == 50
    assert [item.name for item in items[:4]] == [
        "2400/niah_single_1/0",
        "2400/niah_single_1/1",
        "2400/niah_single_1/2",
        "2400/niah_single_2/0",
    ]
    assert len({item.name for item in items}) == len({item.prompt.text for item in items}) == len(items) == 66
    for item in items:
        length, new = item.facts["length"], item.facts["max_new_tokens"]
        assert new == NEW_TOKENS[item.facts["task"]]
        assert 0.95 * length <= len(item.prompt.input_ids) + new <= length, item.name
        assert tokenizer(item.prompt.text, add_special_tokens=False).input_ids == list(item.prompt.input_ids)
        assert not any(reference in item.prompt.text.split("assistant\n")[1] for reference in item.reference)
    assert {NEW_TOKENS[task] for task in NIAH} == {128} and [NEW_TOKENS[t] for t in TASKS[8:]] == [30, 120, 50]


def test_prompts_depend_on_seed_and_their_own_place_only(items, tokenizer):
    again = Ruler(tasks=("cwe", "niah_multikey_3", "vt"), lengths=(LENGTHS[0],), samples=2).items(tokenizer, model())
    by_name = {item.name: item for item in items}
    assert all(by_name[item.name] == item for item in again)
    other = Ruler(tasks=("vt",), lengths=(LENGTHS[0],), samples=1, seed=1).items(tokenizer, model())[0]
    assert other.reference != by_name[other.name].reference


@pytest.mark.parametrize("task", NIAH)
def test_needles(items, task):
    kind = ruler_tasks._NIAH[task]
    for item in of(items, task):
        text = context(item)
        found = NEEDLE.findall(text)
        asked = re.search(r"for (.*) that the text mentions\?$", question(item)).group(1)
        keys = re.split(r", and |, ", asked)
        assert len(keys) == kind.queries and len(set(item.reference)) == kind.values * kind.queries
        assert Counter(v for _, key, v in found if key in keys) == Counter(item.reference)
        assert all(text.count(value) == 1 for value in item.reference)
        assert Counter(Counter(key for _, key, _ in found).values()) == {kind.values: len(found) // kind.values}
        number = r"[1-9][0-9]{6}" if kind.value == "numbers" else UUID
        word = UUID if kind.key == "uuids" else r"[a-z]+-[a-z]+"
        assert all(re.fullmatch(number, value) and re.fullmatch(word, key) for _, key, value in found)
        assert len({value for _, _, value in found}) == len(found)
        plural = kind.values * kind.queries > 1
        assert (f"{found[0][0]}s for" in question(item)) == plural
        assert item.prompt.text.endswith(f" for {asked} that the text mentions {'are' if plural else 'is'}")
        if kind.haystack == "needles":
            assert len(found) == len(text.split("\n")) > 20
        else:
            assert len(found) == kind.keys * kind.values
            rest = NEEDLE.sub("", text)
            assert not re.search("[0-9]", rest)
            if kind.haystack == "noise":
                assert set(rest.split("\n")) == {ruler_tasks._NOISE, ""}
            else:
                assert ruler_tasks._NOISE not in rest
                for sentence in NEEDLE.finditer(text):
                    before = text[: sentence.start()].rstrip()
                    assert not before or before[-1] == "."


def test_depths_are_spread(tokenizer):
    items = Ruler(tasks=("niah_single_1", "niah_single_2"), lengths=(600,), samples=40).items(tokenizer, model())
    for task in ("niah_single_1", "niah_single_2"):
        places = sorted(NEEDLE.search(context(i)).start() / len(context(i)) for i in of(items, task))
        assert places[0] < 0.1 and places[-1] > 0.8 and 0.3 < sum(places) / 40 < 0.6


def test_variable_tracking_is_solved_from_the_text(items):
    for item in of(items, "vt"):
        user, header = item.prompt.text.split("</s>\n<s>assistant\n")
        value = re.search(r"hold the value ([0-9]{5}), given", question(item)).group(1)
        assert header == f"Going through the assignments in the text above, 5 variables hold the value {value}:"
        values, assigned = {}, re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|[0-9]{5})\n", user)
        for name, source in assigned:
            values[name] = values.get(source, source)
        assert len(assigned) == 10 and len(values) == 10
        assert [name for name, held in values.items() if held == value] == item.reference
        own = re.findall(r"VAR ([A-Z]{5}) = ", context(item))
        assert own == item.reference
        example = re.search(r"5 variables hold the value ([0-9]{5}): (.*)\n", user)
        assert example.group(2).split(", ") == [name for name, held in values.items() if held == example.group(1)]


def test_common_words_are_counted_from_the_text(items):
    for item in of(items, "cwe"):
        entries = re.findall(r"([0-9]+)\. ([a-z]+-[a-z]+)", context(item))
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        often, seldom = (6, 1) if item.facts["length"] < 4096 else (30, 3)
        assert sorted(item.reference) == sorted(word for word, times in counts.items() if times == often)
        assert len(item.reference) == 10 and len(counts) > 20 and set(counts.values()) == {often, seldom}
        user = item.prompt.text.split("<s>assistant")[0]
        example, solution = user.split("in the list are: ")[0], user.split("in the list are: ")[1].split("\n")[0]
        counts = Counter(re.findall(r"[a-z]+-[a-z]+", example))
        assert sorted(solution.split(", ")) == sorted(word for word, times in counts.items() if times == 3)
        assert not set(counts) & {word for _, word in entries}


def test_frequent_words_are_counted_from_the_text(items):
    for item in of(items, "fwe"):
        counts = Counter(context(item).split())
        dots = counts.pop("....")
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        top = counts.most_common()
        assert [word for word, _ in top[:3]] == item.reference and top[2][1] > top[3][1]
        assert [dots / times for _, times in top[:3]] == pytest.approx([4, 9, 16], rel=0.08)


def test_no_word_pair_is_part_of_another():
    adjectives, nouns = ruler_tasks.ADJECTIVES, ruler_tasks.NOUNS
    assert len(set(adjectives)) == len(adjectives) and len(set(nouns)) == len(nouns)
    assert len(adjectives) * len(nouns) > 20_000
    assert not any(a != b and a.endswith(b) for a in adjectives for b in adjectives)
    assert not any(a != b and a.startswith(b) for a in nouns for b in nouns)


def test_post_processing():
    assert post_process(" \t 1\x002\x1f\n") == "1\n2"
    assert post_process("\x01 a\tb \x02") == "a\nb"
    assert post_process("\n\n") == ""


@pytest.mark.parametrize(
    ("output", "references", "every", "part"),
    [
        ("it is 1234567.", ["1234567"], 1, 1),
        ("123456", ["1234567"], 0, 0),
        ("QAITS, abcde", ["qaits", "ABCDE", "zzzzz", "yyyyy"], 0.5, 1),
        ("", ["a", "b"], 0, 0),
        ("a b", ["a", "b", "c"], 2 / 3, 1),
    ],
)
def test_string_match(output, references, every, part):
    assert string_match_all(output, references) == pytest.approx(every)
    assert string_match_part(output, references) == part


@pytest.mark.parametrize("references", [[], "1234"])
def test_references_must_be_a_list(references):
    with pytest.raises(PatchError, match="list of at least one string"):
        string_match_all("1234", references)


def test_scores_and_metrics(items):
    task = Ruler(lengths=LENGTHS, samples=3)
    perfect = task.metrics(scored(task, items, ["\x00" + "\x01".join(item.reference).lower() for item in items]))
    assert set(perfect) == {"score", *TASKS, *(f"{length}/{name}" for length in LENGTHS for name in TASKS)}
    assert set(perfect.values()) == {1.0}
    assert set(task.metrics(scored(task, items, [""] * 66)).values()) == {0.0}
    rows = scored(task, items, [i.reference[0] if i.facts["length"] == 5000 else "" for i in items])
    mixed = task.metrics(rows)
    assert mixed["5000/vt"] == pytest.approx(0.2) and mixed["2400/vt"] == 0 and mixed["vt"] == pytest.approx(0.1)
    assert mixed["score"] == pytest.approx(sum(mixed[name] for name in TASKS) / 11)
    few = task.metrics([row for row in rows if row["item"] in ("5000/vt/0", "5000/fwe/0", "5000/fwe/1")])
    assert few["score"] == pytest.approx((1 / 5 + 1 / 3) / 2)


def test_without_a_chat_template():
    items = Ruler(lengths=(2400,), samples=1).items(trained(None), model())
    for item in items:
        assert len(item.prompt.input_ids) <= 2400 - item.facts["max_new_tokens"]
        assert re.search(r"\n(The|Going) [^\n]+$", item.prompt.text) and "assistant" not in item.prompt.text


def test_essays_of_ones_own(tokenizer, tmp_path):
    task = Ruler(tasks=("niah_single_2", "niah_single_1"), lengths=(900,), samples=2, text_folder=tmp_path)
    with pytest.raises(PatchError, match=r"holds no \.txt files"):
        task.items(tokenizer, model())
    text = build_haystack(tokenizer, 2000, seed=3)
    (tmp_path / "a.txt").write_text(text)
    for item in of(task.items(tokenizer, model()), "niah_single_2"):
        rest = re.sub(r"\s+", " ", NEEDLE.sub("", context(item)))
        assert rest[100:300] in re.sub(r"\s+", " ", f"{text} {text}")
        assert 855 <= len(item.prompt.input_ids) + 128 <= 900
    (tmp_path / "a.txt").write_text(text[:1000])
    with pytest.raises(PatchError, match="too short"):
        task.items(tokenizer, model())


def test_refusals(tokenizer):
    for wrong, message in [
        ({"tasks": ("niah",)}, "no task niah; it has niah_single_1, "),
        ({"tasks": ("vt", "vt")}, "each given once"),
        ({"lengths": ()}, "at least one value"),
        ({"samples": 0}, "got 0"),
    ]:
        with pytest.raises(PatchError, match=message):
            Ruler(**wrong)
    with pytest.raises(PatchError, match="needs 2,000 tokens"):
        Ruler().items(tokenizer, model(1999))
    with pytest.raises(PatchError, match="128 tokens, which 100 must exceed"):
        Ruler(lengths=(100,)).items(tokenizer, model())
    with pytest.raises(PatchError, match="leaves no room for cwe: at its shortest it takes"):
        Ruler(tasks=("cwe",), lengths=(400,)).items(tokenizer, model())


def test_more_than_there_are_words_for_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(ruler_tasks, "ADJECTIVES", ruler_tasks.ADJECTIVES[:2])
    monkeypatch.setattr(ruler_tasks, "NOUNS", ruler_tasks.NOUNS[:20])
    with pytest.raises(PatchError, match="more than niah_multikey_2 can fill"):
        Ruler(tasks=("niah_multikey_2",), samples=1).items(tokenizer, model())


def test_evaluate_takes_it_and_stops_each_task_at_its_own_length(tiny):
    task = Ruler(tasks=("fwe", "vt"), lengths=(1600,), samples=1)
    found = evaluate(*tiny, task, [Plan((), "identity")], batch_size=2, control_batches=0)
    tokens = {s["item"]: s["output_tokens"] for s in found.samples}
    assert tokens["1600/fwe/0"] <= 50 and tokens["1600/vt/0"] <= 30
    assert found.summary["rows"][0]["metrics"]["score"] == 0
