import torch

from bench import memory
from bench.memory import peak_bytes

MB = 2**20


def allocate(megabytes: int) -> int:
    return int(torch.empty(megabytes * MB, dtype=torch.uint8).fill_(1)[-1])


def test_memory_that_is_freed_again_is_seen():
    # 4 MB: the code of torch's operators, read in at their first use, and the kernel's counting by thread
    for _ in range(3):  # also where malloc has the blocks of the last call at hand
        result, peak = peak_bytes(lambda: allocate(64), "cpu")
        assert result == 1
        assert abs(peak - 64 * MB) < 4 * MB


def test_blocks_below_mallocs_own_threshold_count_too():
    def call():
        return sum(float(block[0]) for block in [torch.empty(MB, dtype=torch.uint8).fill_(1) for _ in range(32)])

    for _ in range(2):
        result, peak = peak_bytes(call, "cpu")
        assert result == 32
        assert abs(peak - 32 * MB) < 4 * MB


def test_only_the_most_at_a_time_counts_and_only_of_this_call():
    held = torch.empty(32 * MB, dtype=torch.uint8).fill_(1)
    peak_bytes(lambda: allocate(96), "cpu")
    _, peak = peak_bytes(lambda: [allocate(16) for _ in range(8)], "cpu")
    assert 15 * MB < peak < 64 * MB  # malloc keeps some of what is freed resident, but not all 128 MB
    _, peak = peak_bytes(lambda: held[0], "cpu")
    assert peak < 4 * MB


def test_what_is_returned_counts():
    result, peak = peak_bytes(lambda: torch.empty(24 * MB, dtype=torch.uint8).fill_(1), "cpu")
    assert result.nbytes == 24 * MB
    assert abs(peak - 24 * MB) < 4 * MB


def test_none_where_the_kernel_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    assert peak_bytes(lambda: 5, "cpu") == (5, None)
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert peak_bytes(lambda: 5, "cpu") == (5, None)


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert peak_bytes(lambda: log.append("call"), "cuda:0") == (None, 250)
    assert log == ["synchronize", "reset", "call", "synchronize"]
