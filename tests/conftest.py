import copy
import string

import pytest
import torch
from miniatures import MINIATURES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Miniatures are too small to gain from threads, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """A miniature and a tokenizer whose tokens are the bytes of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i + 8 for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE)
    return MINIATURES["llama"].build(vocab_size=8 + len(letters)), tokenizer


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chatty(tiny):
    """The same with a template that writes earlier turns as they were, and answers in ASCII: text and tokens agree."""
    model, tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    printable = tokenizer(string.digits + string.ascii_letters + string.punctuation + " ").input_ids
    other = sorted(set(range(model.config.vocab_size)) - set(printable))
    model.generation_config.suppress_tokens = other
    return model, tokenizer
