import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infer_patch import demo_model
from infer_patch.errors import PatchError
from infer_patch.evals import prose
from infer_patch.evals.haystack import build_haystack, make_needle, needle_prompt, score

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{{ '<s>assistant\n' }}"


def generated(n_paragraphs, seed=0):
    stream = prose.paragraphs(random.Random(seed))
    return [next(stream) for _ in range(n_paragraphs)]


@pytest.fixture(scope="module", params=["byte-level", "prefix-space"])
def tokenizer(request):
    """One tokenizer whose pieces add up to the whole, and one that begins every text with an extra token."""
    if request.param == "byte-level":
        pre, decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        pre, decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre, decoder
    text = [" ".join(paragraph) for paragraph in generated(60)] + ["0 1 2 3 4 5 6 7 8 9 \n\n"]
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=TEMPLATE)


def test_prose_is_varied_and_without_digits():
    sentences = [sentence for paragraph in generated(100) for sentence in paragraph]
    text = " ".join(sentences)
    assert len(set(sentences)) == len(sentences)
    assert not re.search(r"[0-9{}]", text)
    assert all(re.match(r"[A-Z].*[a-z]\.$", sentence) for sentence in sentences)
    assert len(set(re.findall(r"[a-z]+", text.lower()))) > 600


@pytest.mark.parametrize("n_tokens", [60, 700, 3000])
def test_haystack_length(tokenizer, n_tokens):
    text = build_haystack(tokenizer, n_tokens, seed=1)
    assert n_tokens - 20 <= len(tokenizer(text).input_ids) <= n_tokens


def test_equal_seeds_give_equal_prompts(tokenizer):
    first, again, other = (needle_prompt(tokenizer, 500, 0.5, seed) for seed in (4, 4, 5))
    assert first == again
    assert first.text != other.text
    assert first.answer != other.answer


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("chat", [True, False])
def test_needle_prompt(tokenizer, depth, chat):
    n_tokens = 1500
    prompt = needle_prompt(tokenizer, n_tokens, depth, seed=3, chat=chat)
    assert prompt.n_tokens == len(prompt.input_ids)
    assert n_tokens - 20 <= prompt.n_tokens <= n_tokens
    assert tokenizer(prompt.text, add_special_tokens=False).input_ids == prompt.input_ids
    assert prompt.text.count(prompt.needle.sentence) == prompt.text.count(prompt.answer) == 1
    assert re.findall(r"[0-9]+", prompt.text) == [prompt.answer]
    assert abs(prompt.depth - depth) < 0.02
    before, after = prompt.text.split(prompt.needle.sentence)
    assert depth == 0 or before.rstrip().endswith(".")
    assert after.index(prompt.needle.question) == after.rindex(prompt.needle.question)
    assert abs(prompt.tokens_after - (1 - depth) * n_tokens) < 120
    if chat:
        assert prompt.text.endswith(f"{prompt.needle.question}</s>\n<s>assistant\n")
    else:
        assert prompt.text.endswith(f"{prompt.needle.question}\n{prompt.needle.answer_prefix}")


def test_answer_prefix_begins_the_answer(tokenizer):
    prompt = needle_prompt(tokenizer, 400, 0.5, answer_prefix=True)
    assert prompt.text.endswith(f"<s>assistant\n{prompt.needle.answer_prefix}")
    assert prompt.n_tokens <= 400


def test_needles_differ():
    needles = [make_needle(seed) for seed in range(50)]
    assert len({needle.key for needle in needles}) > 10
    assert len({needle.answer for needle in needles}) == 50
    for needle in needles:
        assert len(set(needle.answer)) == 5
        assert needle.answer in needle.sentence
        assert needle.key in needle.sentence
        assert needle.answer not in needle.question + needle.answer_prefix


def test_own_text(tokenizer):
    text = "\n\n".join(" ".join(paragraph) for paragraph in generated(40, seed=9))
    prompt = needle_prompt(tokenizer, 800, 0.5, text=text)
    assert 700 < prompt.n_tokens <= 800
    assert text[:200] in prompt.text
    with pytest.raises(PatchError, match="too short"):
        needle_prompt(tokenizer, 800, 0.5, text=text[:500])


def test_wrong_arguments(tokenizer):
    with pytest.raises(PatchError, match="between 0 and 1, got 50"):
        needle_prompt(tokenizer, 500, 50)
    with pytest.raises(PatchError, match="n_tokens=20 leaves no room"):
        needle_prompt(tokenizer, 20, 0.5)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(PatchError, match="chat=False"):
        needle_prompt(plain, 500, 0.5)


@pytest.mark.parametrize(
    ("output", "answer", "found"),
    [
        ("It is 48213.", "48213", True),
        ("4821", "48213", False),
        ("Red Fox", "red fox", True),
        ("", "1", False),
    ],
)
def test_score(output, answer, found):
    assert score(output, answer) is found


@pytest.mark.skipif(
    not demo_model._is_complete(demo_model.demo_llm_cache()),
    reason="the demo weights were not converted yet: run `infer-patch demo` once",
)
def test_prompt_for_the_demo_model():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model.demo_llm_cache(), local_files_only=True)
    prompt = needle_prompt(tokenizer, 3000, 0.5)
    assert 2985 <= prompt.n_tokens <= 3000
    assert prompt.tokens_after > 600
    assert prompt.text.startswith("<|im_start|>system\n")
    assert prompt.text.endswith("<|im_start|>assistant\n")
