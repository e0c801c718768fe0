"""`calibrate act`: questions, the shortcut through kept hidden states, resuming, the choice of heads, the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

import infer_patch
from infer_patch.calibration import act as calibration
from infer_patch.calibration.act import calibrate, chosen_heads
from infer_patch.calibration.act_settings import Settings
from infer_patch.calibration.choices import generated, read_questions
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.head_lists import read_heads
from infer_patch.patches import ACT

SETTINGS = Settings(threshold=1.5, threshold_mode="relative", layers=(1, 3), batch=4)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """A finished calibration: its document, its folder and the progress it told of."""
    folder, steps = tmp_path_factory.mktemp("act"), []
    datasets, held_out = generated(False, 6, 0), generated(True, 6, 0)
    document = calibrate(*tiny, datasets, SETTINGS, folder, held_out, "tiny", lambda *step: steps.append(step))
    return document, folder, steps, datasets


def test_generated_questions_are_held_out_and_fair():
    train, test = generated(False, 200, 0), generated(True, 200, 0)
    assert [name.split("-")[0] for name in train] == [name.split("-")[0] for name in test]
    for rows, others in zip(train.values(), test.values()):
        assert not {q.prompt for q in rows} & {q.prompt for q in others}
        options = len(rows[0].choices)
        share = [sum(q.answer == k for q in rows) / len(rows) for k in range(options)]
        assert all(abs(x - 1 / options) < 0.1 for x in share)
    assert train == generated(False, 200, 0) and train != generated(False, 200, 1)


def test_the_shortcut_gives_what_whole_passes_give(tiny, measured):
    model, tokenizer = tiny
    _, folder, _, datasets = measured
    name, rows = next(iter(datasets.items()))
    run = calibration._Calibration(model, tokenizer, SETTINGS, folder, "", None)
    kept = json.loads((folder / f"answers-{name}-0.json").read_text())
    for place, layer in enumerate(SETTINGS.layers):
        for head in range(4):
            for i, question in enumerate(rows[:4]):  # one by one, through all layers
                inputs = run._inputs([question])
                (plain,) = run._answers(inputs, [question])
                with infer_patch.patch(model, SETTINGS.method([(layer, head)])):
                    (found,) = run._answers(inputs, [question])
                assert kept[i]["unpatched"] == plain
                assert kept[i]["edited"][place][head] == found
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_states_are_those_that_enter_the_layer(tiny, tmp_path):
    """Logits from the middle of the model on equal those of a whole pass, bit by bit."""
    model, tokenizer = tiny
    run = calibration._Calibration(model, tokenizer, SETTINGS, tmp_path, "", None)
    inputs, states = run._inputs(generated(False, 3, 0)["kind-train"]), {}
    hook = model.model.layers[2].register_forward_hook(calibration._Keep(states, 3))
    with torch.no_grad():
        plain = model(**inputs).logits
        hook.remove()
        with infer_patch.patch(model, ACT(heads=((3, 1),), threshold=0.01)):
            whole = model(**inputs).logits
            with run._starting_at(3, states[3]):
                found = model(**inputs).logits
    assert torch.equal(found, whole) and not torch.equal(found, plain)


def test_the_document_is_a_head_list(tiny, measured, tmp_path):
    document = measured[0]
    assert [i for i, row in enumerate(document["delta"]) if row[0] is not None] == [1, 3]
    assert document["heads"] == chosen_heads(document["delta"], 0.0, None)
    assert set(document["baseline"]) == {"sentiment-train", "topic-train", "kind-train"}
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(document))
    assert {str(k): list(v) for k, v in read_heads(file, "act", "").heads.items()} == document["heads"]
    if document["heads"]:
        found = document["held_out"]
        assert found["won"] - found["lost"] == round(18 * found["difference"])
        assert {row["questions"] for row in found["datasets"].values()} == {6}


def test_progress_ends_where_it_should(measured):
    document, _, steps, _ = measured
    assert [done for done, _, _ in steps] == list(range(len(steps)))
    expected = 3 * 2 * 2 + (2 * 3 * 2 if document["heads"] else 0)
    assert len(steps) == expected


def test_an_interrupted_run_goes_on(tiny, measured, tmp_path, monkeypatch):
    document, _, _, datasets = measured
    answered, original = [], calibration._Calibration._answers

    def interrupted(self, inputs, batch):
        if len(answered) == 12:
            raise KeyboardInterrupt
        answered.append(batch)
        return original(self, inputs, batch)

    monkeypatch.setattr(calibration._Calibration, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*tiny, datasets, SETTINGS, tmp_path)
    assert not infer_patch.api.is_patched(tiny[0])
    assert not any("forward" in vars(layer) for layer in tiny[0].model.layers)
    monkeypatch.setattr(calibration._Calibration, "_answers", original)
    again = calibrate(*tiny, datasets, SETTINGS, tmp_path)
    assert again["delta"] == document["delta"]
    with pytest.raises(PatchError, match="other values of act"):
        calibrate(*tiny, datasets, Settings(beta=0.1, layers=(1, 3), threshold=1.5, batch=4), tmp_path)


def test_heads_are_chosen_by_their_gain():
    delta = [[None] * 3, [0.1, -0.2, 0.0], [0.3, 0.1, 0.05]]
    assert chosen_heads(delta, 0.0, None) == {"1": [0], "2": [0, 1, 2]}
    assert chosen_heads(delta, 0.0, 2) == {"1": [0], "2": [0]}
    assert chosen_heads(delta, 0.5, None) == {}


def test_what_cannot_work_is_refused(tiny, tmp_path):
    with pytest.raises(PatchError, match=r"heads of layers \[0, 9\] were asked for; this llama has 4 layers"):
        calibrate(*tiny, {}, Settings(layers=(0, 2, 9)), tmp_path)
    with pytest.raises(PatchError, match="beta is a share"):
        calibrate(*tiny, {}, Settings(beta=2.0), tmp_path)
    with pytest.raises(PatchError, match=r"expected .jsonl files in"):
        read_questions(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"prompt": "x", "choices": [" a", " b"], "answer": 0}\n{"prompt": "x", "choices": [" a"], "answer": 0}'
    )
    with pytest.raises(PatchError, match=r"a\.jsonl, line 2: expected a question"):
        read_questions(tmp_path)
    file.write_text('{"prompt": "x", "choices": [" a", " b"], "answer": 0}')
    assert read_questions(tmp_path)["a"][0].choices == (" a", " b")


def test_the_command(folder, tmp_path):
    out = tmp_path / "heads.json"
    options = ["--out", str(out), "--questions", "4", "--test-questions", "4", "--layers", "1", "--threshold", "0.05"]
    done = CliRunner().invoke(app, ["calibrate", "act", str(folder), *options])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["layers"] == [1] and document["seed"] == 0
    assert "better alone" in done.output
    assert (tmp_path / "heads" / "gain.png").stat().st_size > 1000
