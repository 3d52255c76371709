import importlib.util

import pytest
from toys import tiny_lm

from ssd_repro.errors import InputError
from ssd_repro.models import runtimes
from ssd_repro.models.runtimes.graphs import StaticLM
from ssd_repro.models.runtimes.openvino import OpenVINOLM


@pytest.fixture
def no_openvino(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else real(name))


def test_auto_takes_the_fast_one_of_the_device():
    assert runtimes.choose_runtime("auto", "cpu") == "openvino"
    assert runtimes.choose_runtime("auto", "cuda:0") == "graphs"
    assert [runtimes.choose_runtime(name, "cpu") for name in ("eager", "graphs")] == ["eager", "graphs"]


def test_without_openvino_auto_says_so_and_is_eager(no_openvino):
    with pytest.warns(UserWarning, match="eager takes its place"):
        assert runtimes.choose_runtime("auto", "cpu") == "eager"


@pytest.mark.parametrize(
    "runtime, device, sentence",
    [
        ("onnx", "cpu", "runtime 'onnx' is unknown: choose auto, eager"),
        ("openvino", "cuda:0", "for CPUs and the device is cuda:0"),
    ],
)
def test_what_cannot_be_had_is_said(runtime, device, sentence):
    with pytest.raises(InputError, match=sentence):
        runtimes.choose_runtime(runtime, device)


def test_asked_for_and_not_installed(no_openvino):
    with pytest.raises(InputError, match="needs the package openvino"):
        runtimes.choose_runtime("openvino", "cpu")


def test_each_gives_a_model_with_sessions():
    kinds = {name: type(runtimes.with_runtime(tiny_lm(2), name, "fp32", 1, 64)) for name in runtimes.RUNTIMES[1:]}
    assert kinds == {"eager": type(tiny_lm(1)), "graphs": StaticLM, "openvino": OpenVINOLM}


@pytest.mark.parametrize("runtime, precision", [("eager", "int8"), ("graphs", "fp8"), ("openvino", "fp16")])
def test_a_precision_that_the_runtime_has_not(runtime, precision):
    with pytest.raises(InputError, match=f"precision '{precision}' is unknown to the runtime {runtime}: choose"):
        runtimes.choose_runtime(runtime, "cpu", precision)


@pytest.mark.parametrize("multiplies, best", [(True, "w8a8"), (False, "fp32")])
def test_auto_takes_the_fastest_precision_of_the_machine(monkeypatch, multiplies, best):
    monkeypatch.setattr(runtimes.openvino, "multiplies_int8", lambda: multiplies)
    for runtime, device, wanted in (
        ("openvino", "cpu", best),
        ("eager", "cpu", "fp32"),
        ("graphs", "cuda:0", "bf16"),
        ("eager", "cuda:0", "bf16"),
    ):
        assert runtimes.choose_runtime(runtime, device.partition(":")[0], "auto") == runtime
        assert runtimes.choose_precision("auto", runtime, device) == wanted
        assert runtimes.choose_precision("fp32", runtime, device) == "fp32"
