"""What ranks do when one of them fails or is killed: forked processes, without a model."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait

import pytest
import torch
from torch.distributed import TCPStore

from entropy_probe.cli.errors import one_line_excepthook
from entropy_probe.cli.ranks import LOST, launched_ranks
from entropy_probe.parallel.ranks import ALONE, Ranks
from tests.distributed.launch import rank_environment


def one_rank(environment, directory, body) -> None:
    """A process of its own: what the command line does with a command's errors."""
    os.environ.update(environment)
    sys.stderr = (directory / f"stderr-{environment['RANK']}").open("w")
    code = 0
    try:
        with launched_ranks() as ranks:
            body(ranks)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    except Exception as error:
        one_line_excepthook(type(error), error, None)
        code = 1
    sys.stderr.flush()
    os._exit(code)


def launch(directory, size: int, body, store: TCPStore | None = None, attempt: int = 0) -> tuple[list[int], list[str]]:
    """As torchrun does: a store that outlives the ranks, and SIGTERM to all others when one has failed.

    Exit codes, and what each rank wrote to stderr.
    """
    store = store or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    attempted = {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
    arguments = [(environment | attempted, directory, body) for environment in rank_environment(size, store)]
    processes = [context.Process(target=one_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    while (running := [p for p in processes if p.exitcode is None]) and not any(p.exitcode for p in processes):
        assert wait([process.sentinel for process in running], 60), "a rank hangs"
    for process in running:
        process.terminate()
        process.join(60)
    return [p.exitcode for p in processes], [(directory / f"stderr-{rank}").read_text() for rank in range(size)]


def compute(ranks: Ranks) -> None:
    """Work without any exchange, as long as a batch of a large model may take."""
    for _ in range(4000):
        time.sleep(0.01)
    sys.stderr.write("it was not ended\n")


def exchange(ranks: Ranks) -> None:
    """Wait for the others."""
    ranks.sum(torch.ones(3, dtype=torch.float64))


def test_ranks_exchange_what_they_are_asked_to(tmp_path):
    def body(ranks: Ranks) -> None:
        assert ranks.sum(torch.tensor([1.0, ranks.rank], dtype=torch.float64)).tolist() == [3, 0 + 1 + 2]
        assert ranks.broadcast(f"from {ranks.rank}") == "from 0"
        assert ranks.gather(ranks.rank) == [0, 1, 2]
        like = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in
                (("a", torch.float32), ("b", torch.float64), ("c", torch.bfloat16), ("d", torch.float32))}  # fmt: skip
        own = {"a": torch.full((2, 3), 1.0 + ranks.rank), "b": like["b"] + 1, "c": None, "d": None}
        total = ranks.sum_vector(own | ({"c": torch.ones(2, 3)} if ranks.rank == 1 else {}), like)
        assert total["a"].tolist() == [[6.0] * 3] * 2
        assert total["b"].dtype == torch.float64
        assert total["c"].tolist() == [[1.0] * 3] * 2
        assert total["d"] is None

    assert launch(tmp_path, 3, body) == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("meanwhile", [compute, exchange])
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_ends_the_others(tmp_path, killed, meanwhile):
    def body(ranks: Ranks) -> None:
        if ranks.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        meanwhile(ranks)

    codes, errors = launch(tmp_path, 3, body)
    assert codes[killed] == -signal.SIGKILL
    assert {codes[rank] for rank in {0, 1, 2} - {killed}} <= {1, -signal.SIGTERM}
    # a rank that is ended before its exchange fails has nothing to say
    assert "".join(errors) in ("", f"error: {LOST}\n")


@pytest.mark.parametrize("meanwhile", [compute, exchange])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("kind", "code", "said"), [
    (ValueError, 2, "error: no good"), (RuntimeError, 1, "error: RuntimeError: no good; set ENTROPY_PROBE_DEBUG=1")
])  # fmt: skip
def test_an_error_on_one_rank_ends_all_and_is_said_once(tmp_path, failing, kind, code, said, meanwhile):
    def body(ranks: Ranks) -> None:
        if ranks.rank == failing:
            raise kind("no good")
        meanwhile(ranks)

    codes, errors = launch(tmp_path, 3, body)
    assert codes[failing] == code
    assert {codes[rank] for rank in {0, 1, 2} - {failing}} == {-signal.SIGTERM}
    assert errors[failing].startswith(said)
    assert "".join(errors).count("\n") == 1


def test_ranks_that_torchrun_starts_again_join_anew(tmp_path):
    """``--max-restarts``: the store is that of the attempt before, and so is what it says of who failed first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def failing(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("no good")
        exchange(ranks)

    assert launch(tmp_path, 2, failing, store)[1] == ["", "error: no good\n"]
    assert launch(tmp_path, 2, failing, store, attempt=1)[1] == ["", "error: no good\n"]
    assert launch(tmp_path, 2, exchange, store, attempt=2) == ([0, 0], ["", ""])


def test_the_same_error_on_all_ranks_is_said_once(tmp_path):
    def body(ranks: Ranks) -> None:
        raise ValueError("config: unknown key")

    codes, errors = launch(tmp_path, 4, body)
    assert sorted(codes) == [-signal.SIGTERM] * 3 + [2]
    assert sorted(errors) == ["", "", "", "error: config: unknown key\n"]


def test_an_agreed_error_is_said_once_and_cleans_up(tmp_path):
    def body(ranks: Ranks) -> None:
        try:
            with ranks.agreeing():
                if ranks.rank == 1:
                    raise ValueError("scores: not finite")
        finally:
            (tmp_path / f"cleaned-{ranks.rank}").touch()

    codes, errors = launch(tmp_path, 3, body)
    assert sorted(codes) == [-signal.SIGTERM] * 2 + [2]
    assert "".join(errors) == "error: scores: not finite\n"
    assert len(list(tmp_path.glob("cleaned-*"))) == 3


def test_a_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched_ranks() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="environment: expected RANK, MASTER_ADDR, MASTER_PORT"), launched_ranks():
        pass
