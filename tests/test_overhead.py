"""The statistics of `bench overhead`; its timing is not tested, only what is said about it."""

import pytest
import torch

from infer_patch.errors import PatchError
from infer_patch.evals.cost import turned
from infer_patch.evals.overhead import Settings, measure, median_interval, quantile, summarise, tiny_model, verdict
from infer_patch.plan import Plan

EVEN = [0.999, 1.0, 1.001] * 4


@pytest.mark.parametrize(
    "patched, control, goal, expected",
    [
        ([1.01] * 12, EVEN, 0.02, "met"),
        ([1.03] * 12, EVEN, 0.02, "missed"),
        ([1.01, 1.03] * 6, EVEN, 0.02, "undecided: the median lies between +1.0% and +3.0%; take more rounds"),
        ([1.01] * 12, [1.05] * 12, 0.02, "undecided: unpatched differs from itself by +5.0%"),
        ([1.01] * 5, EVEN, 0.02, "undecided: fewer than 6 measurements"),
        ([0.9] * 12, EVEN, None, "faster"),
        ([1.1] * 12, EVEN, None, "slower"),
    ],
)
def test_verdict_is_no_finer_than_the_noise(patched, control, goal, expected):
    assert verdict(patched, control, goal) == expected


def test_interval_of_the_median():
    # binomial(12, 1/2): P(at most 2) = 0.019, P(at most 3) = 0.073; so the 3rd smallest to the 3rd largest
    assert median_interval([float(i) for i in range(12)]) == (2.0, 9.0)
    assert median_interval([float(i) for i in range(6)]) == (0.0, 5.0)
    assert median_interval([3.0]) == (3.0, 3.0)


def test_quantiles_interpolate():
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == 2.0


def test_ratios_are_taken_side_by_side():
    # the second half of the run is twice as slow for everybody
    seconds = {"unpatched": [1.0] * 6 + [2.0] * 6, "control": [1.0] * 6 + [2.0] * 6, "p": [1.01] * 6 + [2.02] * 6}
    found = summarise(seconds, "p", 0.02)
    assert (
        found["ratio"]["patched"]["median"] == found["ratio_of_sums"]["patched"] == 1.01 and found["verdict"] == "met"
    )
    assert found["milliseconds"]["unpatched"]["median"] == 1500.0


def test_a_text_is_read_and_decoded_in_order():
    model, seen = tiny_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    text = torch.arange(3, 20)
    settings = Settings(lengths=(5,), new_tokens=2, rounds=1)
    found = measure(model, [Plan()], settings, tokens=text)
    expected = [[[3, 4, 5, 6, 7]], [[8]], [[9]]]
    assert found[0]["measurements"] == 1 and found[1]["measurements"] == 2
    assert [x for i, x in enumerate(seen) if i % 3 == 0] == expected * 2 and len(seen) == 18  # three sides, two rounds
    with pytest.raises(PatchError, match="the text has 17 tokens, 18 are needed"):
        measure(model, [Plan()], Settings(lengths=(16,), new_tokens=2), tokens=text)


def test_every_order_comes_up_in_six_rounds():
    assert len({tuple(turned("abc", turn)) for turn in range(6)}) == 6


def test_settings_are_checked():
    with pytest.raises(PatchError, match="lengths"):
        Settings(lengths=(0,))
    with pytest.raises(PatchError, match="rounds"):
        Settings(rounds=0)
    with pytest.raises(PatchError, match="clock"):
        Settings(clock="sundial")
