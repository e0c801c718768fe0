"""What the harness adapters do without a harness: errors for a missing package, plans, warnings."""

import importlib
import json
import sys

import pytest
import torch
from miniatures import MINIATURES, text_inputs

import infer_patch
from infer_patch import availability
from infer_patch.errors import MissingDependencyError, PatchError, PlanError
from infer_patch.harness.outcome import only_stores, read_plan, record, refuse_remote_code, warning
from infer_patch.method import Method
from infer_patch.patches import Envelope, SinkWindow
from infer_patch.plan import Plan


@pytest.mark.parametrize("package, module", [("lm-eval", "lm_eval"), ("lmms-eval", "lmms_eval")])
@pytest.mark.parametrize("version", [None, "0.1.0"])
def test_a_missing_or_old_package_is_named(monkeypatch, package, module, version):
    found = {package: version}
    monkeypatch.setattr(availability, "installed_version", lambda name: found.get(name, "99"))
    monkeypatch.delitem(sys.modules, f"infer_patch.harness.{module}", raising=False)
    with pytest.raises(MissingDependencyError, match=rf'pip install "infer_patch\[{package}\]"') as caught:
        importlib.import_module(f"infer_patch.harness.{module}")
    assert caught.value.name == package


def test_plans_are_read_by_name_and_path(tmp_path):
    assert read_plan("envelope") == Plan.preset("envelope")
    path = tmp_path / "own.yaml"
    Plan((SinkWindow(window=64),), name="own").save(path)
    assert read_plan(str(path)).name == "own"
    assert read_plan(f'"{path}"').name == "own"
    assert read_plan(Envelope()).methods == (Envelope(),)


@pytest.mark.parametrize("value", [None, "", "envelop", 5])
def test_bad_plans_are_told(value):
    with pytest.raises(PlanError):
        read_plan(value)


def test_remote_code_is_refused():
    refuse_remote_code(False)
    with pytest.raises(PatchError, match="never runs code"):
        refuse_remote_code(True)


class OnlyStore(Method):
    name, ports = "only_store", ("store",)


def test_plans_that_act_on_the_cache_alone():
    assert only_stores(Plan((OnlyStore(),)))
    assert not only_stores(Plan((OnlyStore(layers=(0,)), SinkWindow(layers=(1,)))))
    assert not only_stores(Plan((SinkWindow(evict=True),)))
    assert not only_stores(Plan())


def test_record_and_warnings_follow_what_happened():
    mini = MINIATURES["llama"]
    model = mini.build()
    inputs = text_inputs(mini, lengths=(200,))
    with infer_patch.patch(model, SinkWindow(window=64, dense_below=100)) as handle, torch.no_grad():
        assert "never ran" in warning(handle)
        model(**{name: tensor[:, :50] for name, tensor in inputs.items()})
        assert "sink_window never took effect" in warning(handle)
        model(**inputs)
        assert warning(handle) is None
        said = json.loads(json.dumps(record(handle)))
    assert Plan.from_dict(said["plan"]) == handle.plan
    assert said["report"]["forward_calls"] == 2 and said["report"]["methods"]["sink_window"]["fired"]
    with infer_patch.patch(model, "identity") as handle:
        assert warning(handle) is None
