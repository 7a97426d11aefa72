import pytest
import torch

from dskd_fast.backends import native_build
from dskd_fast.cli import doctor
from dskd_fast.errors import UserError
from dskd_fast.ops import dispatch
from dskd_fast.versions import versions


def test_versions_name_what_matters_and_what_is_missing(monkeypatch, cli):
    found = doctor.description()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"dskd-fast", "Python", "triton", "CPU", "folder"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
    assert ("GPU" in found) is not torch.cuda.is_available()
    code, out, err = cli("doctor")
    assert code == 0, err
    for text in (*found.values(), *dispatch.BACKENDS, "DSKD_FAST_BACKEND is not set", "yes, and the choice", "no:"):
        assert text in out
    monkeypatch.setattr(doctor, "versions", lambda *packages: versions("no-such-package"))
    assert doctor.description()["no-such-package"] == "not installed"


def test_every_backend_answers_for_every_device():
    services = doctor.services()
    calls = {(service.device, service.dtype) for service in services}
    for call in calls:
        answers = [service for service in services if (service.device, service.dtype) == call]
        assert [service.backend for service in answers] == list(dispatch.BACKENDS)
        assert [service.reason for service in answers if service.is_choice] == [None]
    assert all(service.reason is None or service.reason for service in services)


def test_the_variable(monkeypatch):
    assert "not set" in doctor.default_backend()
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    assert "every call takes it" in doctor.default_backend()
    assert {service.backend for service in doctor.services() if service.is_choice} == {"torch"}
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cuda")
    assert not any(service.is_choice for service in doctor.services() if service.device == "cpu")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "quantum")
    with pytest.raises(UserError, match=r"DSKD_FAST_BACKEND=quantum is not known: use one of .*torch"):
        doctor.default_backend()


def test_what_became_of_the_kernels(monkeypatch):
    doctor.services()
    cpu, cuda = doctor.builds()
    assert cpu.startswith("cpu kernels: ")
    if not torch.cuda.is_available():
        assert cuda.startswith("cuda kernels: not needed here")

    failed = native_build.State("the compiler failed, its output is in cache/cpu-0.log", "")
    monkeypatch.setitem(native_build._STATES, "cpu", failed)
    assert doctor.builds()[0] == f"cpu kernels: {failed.reason}"
    assert failed.reason in {service.reason for service in doctor.services() if service.backend == "cpu"}
