"""Plain recomputations of second streams, without a cache, for the tests of DAMRO and of guidance."""

import torch

from infer_patch.second_stream import SecondStream


def recomputed(model, second, answer):
    """Logits [t + 1, vocabulary] after a second prompt (a dict of `_second`) and each of t tokens of an answer."""
    embedding = model.get_input_embeddings()
    start = second["inputs_embeds"] if "inputs_embeds" in second else embedding(second["input_ids"])
    embeds = torch.cat([start, embedding(answer)])[None]
    places = torch.arange(embeds.shape[1])[None]  # else Qwen-VL takes those of the prompt with pictures
    return model(inputs_embeds=embeds, position_ids=places, use_cache=False).logits[0, len(start) - 1 :]


def without_cache(processor: SecondStream):
    """The same processor, computing prompt and answer anew in every step, sample by sample."""

    def stream(ids):
        prompt = processor._prompt
        samples = [processor._second[i // (len(ids) // len(prompt))] for i in range(len(ids))]
        answers = ids[:, prompt.shape[1] :]
        return torch.stack([recomputed(processor.model, s, a)[-1] for s, a in zip(samples, answers)])

    processor._second_stream = stream
    return processor


@torch.no_grad()
def both_streams(model, inputs, processor, answer):
    """Log-probabilities [t, vocabulary] of both streams before each of t tokens of an answer; one prompt."""
    prompt, t = inputs["input_ids"], len(answer)
    call = dict(inputs, input_ids=torch.cat([prompt, answer[None]], 1), use_cache=False)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    first = model(**call).logits[0, prompt.shape[1] - 1 : -1]
    second = recomputed(model, processor._second[0], answer)[:t]
    return first.log_softmax(-1), second.log_softmax(-1)
