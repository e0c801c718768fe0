"""A checkpoint, plans and task data for the harness tests: all local, all small, the same on every call."""

import json
import random

from miniatures import MINIATURES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
STRONG = "name: strong\nmethods: [{method: sink_window, window: 64, dense_below: 0}]\n"
LENGTHS = (340, 150, 420, 210, 500)  # characters, and so tokens, of the prompts


def save_text_model(folder):
    """A miniature Llama, and a tokenizer of bytes with the special tokens that harnesses need."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL)} | {letter: i + 8 for i, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    MINIATURES["llama"].build(vocab_size=8 + len(letters)).save_pretrained(folder)
    return folder


def texts(lengths=LENGTHS, seed=0):
    """Texts of words drawn at random, one of each length."""
    draw = random.Random(seed)
    words = ["ant", "bell", "crow", "door", "elm", "fig", "gate", "hill", "ink", "jar"]
    return [" ".join(draw.choice(words) for _ in range(length))[:length] for length in lengths]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
