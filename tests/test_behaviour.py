"""What every method must do on every family: take effect, come off without a trace, treat each sample as if alone."""

import warnings

import pytest
import torch
from miniatures import GREEDY
from rows import CASE_IDS, CASES, inputs_for
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


@pytest.mark.parametrize("row, mini", CASES, ids=CASE_IDS)
def test_takes_effect_and_reverts(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    tokens, steps = generated(model, inputs)
    logits = last_logits(model, inputs)
    before = snapshot(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rows that keep everything say that they never took effect
        with infer_patch.patch(model, list(row.methods)) as handle:
            patched_tokens, patched_steps = generated(model, inputs)
            patched = last_logits(model, inputs)
            report = handle.report()

    assert snapshot(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    assert torch.equal(last_logits(model, inputs), logits)
    if row.neutral:
        assert torch.equal(patched_tokens, tokens)
        assert torch.equal(patched, logits)
    else:
        assert not torch.equal(patched_steps, steps)
    assert bool(report.silent) == (not row.fires)


@pytest.mark.parametrize("row, mini", CASES, ids=CASE_IDS)
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


@pytest.mark.parametrize("row, mini", CASES, ids=CASE_IDS)
def test_a_padded_batch_gives_what_its_samples_give_alone(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with infer_patch.patch(model, list(row.methods)):
            batch, logits = model.generate(**inputs, **GREEDY), last_logits(model, inputs)
            width = inputs["input_ids"].shape[1]
            for i in range(3):
                alone = inputs_for(row, mini, only=i)
                torch.testing.assert_close(logits[i], last_logits(model, alone)[0], atol=1e-4, rtol=1e-4)
                tokens = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
                assert torch.equal(batch[i, width:], tokens)


PRUNING = [(row, mini) for row, mini in CASES if row.vision and all(m.ports == ("reduce",) for m in row.methods)]


@pytest.mark.parametrize("row, mini", PRUNING, ids=[f"{row.name}-{mini.name}" for row, mini in PRUNING])
def test_text_only_prompts_are_untouched_by_pruning(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini, only=2)
    expected = last_logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with infer_patch.patch(model, list(row.methods)):
            assert torch.equal(last_logits(model, inputs), expected)
