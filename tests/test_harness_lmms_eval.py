"""The lmms-eval adapter, with the real lmms-eval and the demo vision-language model; skipped where lmms-eval is not
installed (`make harness` installs it)."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from harness_data import write_jsonl

pytest.importorskip("lmms_eval")
lmms_eval = pytest.importorskip("lmms_eval.evaluator")
logger = pytest.importorskip("loguru").logger

from lmms_eval.models import get_model, list_available_models  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

import infer_patch  # noqa: E402
from infer_patch.demo_vlm import demo_vlm_path  # noqa: E402
from infer_patch.errors import PatchError, PlanError, UnsupportedCallError  # noqa: E402
from infer_patch.evals.scenes import make_scene  # noqa: E402

TASK = "tiny_scenes"
STRONG = "name: strong\nmethods: [{method: random, layer: 1, drop_ratio: 0.95}]\n"
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}

def mean(items):
    return sum(items) / len(items)
"""


class Function(str):
    """A YAML value `!function name`."""


yaml.SafeDumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", name))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of one task: eight questions about four drawn scenes."""
    root = tmp_path_factory.mktemp("tasks")
    rows = []
    for seed in range(4):
        scene = make_scene(seed, layout="free")
        scene.image().save(root / f"{seed}.png")
        color, shape = sorted(scene.names)[0].split()
        rows.append({"image": str(root / f"{seed}.png"), "question": f"what color is the {shape} ?", "answer": color})
        rows.append({"image": rows[-1]["image"], "question": f"what shape is the {color} object ?", "answer": shape})
    data = write_jsonl(root / "scenes.jsonl", rows)
    (root / "utils.py").write_text(UTILS)
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 6, "temperature": 0, "do_sample": False},
        "doc_to_visual": Function("utils.doc_to_visual"),
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "process_results": Function("utils.process_results"),
        "metric_list": [{"metric": "accuracy", "aggregation": Function("utils.mean"), "higher_is_better": True}],
    }
    (root / f"{TASK}.yaml").write_text(yaml.safe_dump(task))
    return root


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "strong.yaml"
    path.write_text(STRONG)
    return path


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def evaluate(manager):
    def run(model, **options):
        force_simple = options.pop("force_simple", False)
        place = {"device_map": "cpu"} if model == "llava_hf" else {}
        arguments = {"pretrained": demo_vlm_path(), "dtype": "float32", **place, **options}
        torch.manual_seed(0)
        return lmms_eval.simple_evaluate(
            model=model,
            model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
            tasks=[TASK],
            task_manager=manager,
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
            force_simple=force_simple,
        )

    return run


@pytest.fixture(scope="module")
def plain(evaluate):
    return evaluate("llava_hf")


@pytest.fixture
def log():
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), level="INFO")
    yield lines
    logger.remove(sink)


def responses(results):
    return [sample["resps"] for sample in sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])]


def accuracy(results):
    return results["results"][TASK]["accuracy,none"]


def test_the_entry_point_makes_the_name_known():
    assert "infer_patch" in list_available_models()
    assert get_model("infer_patch").__name__ == "InferPatch"
    assert get_model("infer_patch", True).__name__ == "InferPatchSimple"


def test_identity_gives_the_numbers_of_the_backend(evaluate, plain):
    identity = evaluate("infer_patch", plan="identity")
    assert responses(identity) == responses(plain)
    assert accuracy(identity) == accuracy(plain) > 0.5
    assert "InferPatch_llava_hf (chat)" in identity["config"]["model_backend"]


def test_a_strong_plan_changes_them_and_says_so(evaluate, plain, strong, tmp_path, log):
    results = evaluate("infer_patch", plan=strong, report=tmp_path / "report.json")
    assert responses(results) != responses(plain)
    assert accuracy(results) < accuracy(plain)
    said = json.loads((tmp_path / "report.json").read_text())
    assert infer_patch.Plan.from_dict(said["plan"]) == infer_patch.Plan.load(strong)
    figures = said["report"]["methods"]["random"]
    assert figures["fired"] and figures["visual_tokens_kept"]["1"] < figures["visual_tokens"]["1"]
    assert any("plan strong on llava" in line and "visual tokens" in line for line in log)


def test_simple_models(evaluate, strong):
    """`--force_simple` takes the other class of a backend. Its loglikelihoods fail on transformers 5, unpatched too."""
    plain = evaluate("llava_hf", force_simple=True)
    identity = evaluate("infer_patch", plan="identity", force_simple=True)
    assert responses(identity) == responses(plain)
    assert "(simple)" in identity["config"]["model_backend"]
    assert responses(evaluate("infer_patch", plan=strong, force_simple=True)) != responses(plain)


def make(arguments):
    return get_model("infer_patch").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})


def test_the_model_is_unpatched_when_the_harness_cleans_up(strong):
    lm = make(f"pretrained=demo-vlm,plan={strong}")
    model = lm.model
    assert infer_patch.is_patched(model) and "generate" in vars(model)
    lm.clean()
    assert not infer_patch.is_patched(model) and "generate" not in vars(model)


def test_a_plan_that_never_took_effect_is_reported(evaluate, log):
    evaluate("infer_patch", plan="sink_window")
    assert any("sink_window never took effect" in line for line in log)


def test_errors_are_not_scored_as_empty_answers(manager, strong):
    """The backend catches every exception of `generate`, logs it, and answers with an empty text."""

    def refuse(*args):
        raise UnsupportedCallError("refused for the test")

    lm = make(f"pretrained=demo-vlm,plan={strong}")
    lm.model.register_forward_pre_hook(refuse)
    with pytest.raises(UnsupportedCallError, match="refused for the test"):
        lmms_eval.simple_evaluate(model=lm, tasks=[TASK], task_manager=manager, limit=1)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ("pretrained=/no/such/folder", PlanError, "plan=NAME with one of"),
        ("pretrained=/no/such/folder,plan=fastvv", PlanError, "unknown preset 'fastvv'"),
        ("pretrained=/no/such/folder,plan=fastv,report=/no/such/folder/x.json", PatchError, "there is no folder"),
        ("pretrained=/no/such/folder,plan=fastv,trust_remote_code=True", PatchError, "never runs code"),
        ("plan=fastv", PatchError, "pretrained=FOLDER"),
        ("pretrained=/no/such/folder,plan=fastv", PatchError, "cannot load"),
        pytest.param(
            *("plan=fastv,backend=dummy", PatchError, "not a model of transformers"),
            marks=pytest.mark.skipif("dummy" not in list_available_models(), reason="older than lmms-eval 0.7.1"),
        ),
    ],
)
def test_mistakes_are_told(arguments, error, words):
    with pytest.raises(error, match=words):
        make(arguments)


def test_a_model_type_without_a_backend_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PatchError, match=r"no model named after 'llama'.*backend=NAME"):
        make(f"pretrained={tmp_path},plan=fastv")


def test_the_command_line(tasks, strong, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "infer_patch", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained=demo-vlm,plan={strong},report={tmp_path / 'report.json'}"]
    command += ["--tasks", TASK, "--include_path", str(tasks), "--output_path", str(tmp_path), "--limit", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "plan strong on llava" in done.stdout
    (file,) = tmp_path.rglob("*_results.json")
    assert TASK in json.loads(file.read_text())["results"]
    assert json.loads((tmp_path / "report.json").read_text())["report"]["methods"]["random"]["fired"]
