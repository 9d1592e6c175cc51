"""What the tests share: stock scvi-tools, the backends that can run here, hypothesis' settings."""

from __future__ import annotations

import importlib.util
import os
import warnings

# Threads that wait must sleep: spinning, they cost seconds a test where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# NumPy's own threads make Triton's interpreter several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import interpreter
import pytest
import torch

from decoder_fast.backends import BACKENDS, OPERATIONS, choose

# The same examples at every run, so that a failure is never a matter of luck; and no deadline,
# because the first call of anything in torch is slow.
hypothesis.settings.register_profile(
    "decoder_fast", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("decoder_fast")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once a process that CSR tensors are in beta
    torch.zeros(1, 1).to_sparse_csr()


# Read by Triton when it first meets a kernel: a process interprets them or compiles them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _split(operation: str) -> tuple[list[str], list[str]]:
    """Backends that can run an operation on this machine's CPU, and those that cannot.

    Triton cannot: its kernels, interpreted or on a GPU, are tested in files of their own.
    """
    can: list[str] = []
    cannot: list[str] = ["triton"]
    for name in BACKENDS[1:]:
        try:
            choose(operation, name, device=torch.device("cpu"))
        except RuntimeError:
            cannot.append(name)
        else:
            can.append(name)
    return can, cannot


def pytest_report_header() -> list[str]:
    """Say which backends are tested, and why the others are not."""
    return [
        line
        for operation in OPERATIONS
        for line in str(choose(operation, device=torch.device("cpu"))).splitlines()
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers."""
    config.addinivalue_line("markers", "computes_in(dtype): dtype that the test computes in")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take ``backend`` on every backend that can run the module's ``OPERATION``.

    ``missing_backend`` stands for those that cannot: Triton at least, as tests run on the CPU.
    """
    for fixture, which in (("backend", 0), ("missing_backend", 1)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, _split(metafunc.module.OPERATION)[which])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases whose dtype or likelihood their backend does not offer.

    The dtype is that of the test's marker ``computes_in``, or float32.
    """
    offered = []
    left_out = []
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        marker = item.get_closest_marker("computes_in")
        if "backend" in case:
            try:
                choose(
                    item.module.OPERATION,
                    case["backend"],
                    device=torch.device("cpu"),
                    dtype=marker.args[0] if marker else torch.float32,
                    likelihood=case.get("likelihood"),
                )
            except RuntimeError:
                left_out.append(item)
                continue
        offered.append(item)
    if left_out:
        items[:] = offered
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _not_interpreted(request, monkeypatch):
    """Let a missing Triton be missing."""
    if "missing_backend" in request.fixturenames:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton's kernels are tested: on a GPU, else in Triton's interpreter on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'triton>=3.6,<3.10' (Linux)")
    if not torch.cuda.is_available():
        interpreter.patch_once()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new floating-point tensors with NaN, so that an element nobody wrote is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def stock():
    """scvi-tools' ``log_nb_positive`` and ``log_zinb_positive``."""
    return pytest.importorskip(
        "scvi.distributions._negative_binomial",
        reason="scvi-tools is not installed: pip install scvi-tools",
    )


@pytest.fixture
def one_thread():
    """Many small operations: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """Train in a folder of the test's own, without Lightning's advice on tiny data."""
    monkeypatch.chdir(tmp_path)  # Lightning leaves its logs in the current folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def dynamo():
    """torch.compile without what earlier tests compiled."""
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()
