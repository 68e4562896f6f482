"""The CUDA operators, compiled for the CPU once per test run."""

import pytest

from tests.cuda.host import COMPILER, build


@pytest.fixture(scope="session")
def ops(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("host_cuda"))


@pytest.fixture
def every_order(ops):
    """Runs `check()` with the threads in three orders; what it returns must not depend on the order."""

    def run(check):
        results = []
        try:
            for order in (0, 1, 2):
                ops.set_order(order)
                results.append(check())
        finally:
            ops.set_order(0)
        for result in results[1:]:
            assert result.numpy(force=True).tobytes() == results[0].numpy(force=True).tobytes()

    return run
