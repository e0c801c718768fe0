"""Every method on every family takes effect and comes off without a trace; samples are served as if alone."""

import warnings

import pytest
import torch
from miniatures import GREEDY
from rows import CASES, PAIRS, ids, inputs_for
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import infer_patch


def snapshot(model):
    """Everything a patch could leave behind."""
    modules = {
        name: (
            sorted(vars(module)),
            {key: len(value) for key, value in vars(module).items() if "hooks" in key and hasattr(value, "__len__")},
            id(vars(module).get("config")),
        )
        for name, module in model.named_modules()
    }
    configs = model.config.to_dict(), model.config._attn_implementation, model.generation_config.to_dict()
    return modules, configs, sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)


def last_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def generated(model, inputs):
    """Tokens, and the logits of every step: the first is the prompt's, the others read the cache."""
    out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("row, mini", CASES, ids=ids(CASES))
def test_takes_effect_and_reverts(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    tokens, steps = generated(model, inputs)
    before = snapshot(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rows that keep everything say that they never took effect
        with infer_patch.patch(model, list(row.methods)) as handle:
            patched_tokens, patched_steps = generated(model, inputs)
            report = handle.report()

    assert snapshot(model) == before
    tokens_after, steps_after = generated(model, inputs)
    assert torch.equal(tokens_after, tokens)
    assert torch.equal(steps_after, steps)
    if row.neutral:
        assert torch.equal(patched_tokens, tokens)
        assert torch.equal(patched_steps, steps)
    else:
        assert not torch.equal(patched_steps, steps)
    assert bool(report.silent) == (not row.fires)


@pytest.mark.parametrize("row, mini", PAIRS, ids=ids(PAIRS))
def test_reverts_after_an_exception(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini, only=0)
    logits, before = last_logits(model, inputs), snapshot(model)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), infer_patch.patch(model, list(row.methods)) as handle:
        model(**inputs)
    hook.remove()
    assert not handle.active
    assert snapshot(model) == before
    assert torch.equal(last_logits(model, inputs), logits)


@pytest.mark.parametrize("row, mini", PAIRS, ids=ids(PAIRS))
def test_a_padded_batch_gives_what_its_samples_give_alone(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with infer_patch.patch(model, list(row.methods)):
            batch, steps = generated(model, inputs)
            width = inputs["input_ids"].shape[1]
            for i in range(3):
                alone = inputs_for(row, mini, only=i)
                tokens, own = generated(model, alone)
                torch.testing.assert_close(steps[i, 0], own[0, 0], atol=1e-4, rtol=1e-4)
                assert torch.equal(batch[i, width:], tokens[0, alone["input_ids"].shape[1] :])


PRUNING = [(row, mini) for row, mini in CASES if row.vision and all(m.ports == ("reduce",) for m in row.methods)]


@pytest.mark.parametrize("row, mini", PRUNING, ids=ids(PRUNING))
def test_text_only_prompts_are_untouched_by_pruning(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini, only=2)
    expected = last_logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with infer_patch.patch(model, list(row.methods)):
            assert torch.equal(last_logits(model, inputs), expected)
