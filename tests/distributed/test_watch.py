"""What ranks do when one of them fails or is killed: forked processes, without a model."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from entropy_probe.cli.errors import one_line_excepthook
from entropy_probe.cli.ranks import launched_ranks
from entropy_probe.parallel.ranks import ALONE, Ranks
from tests.distributed.launch import free_port


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Forked processes have this module as it is here."""
    monkeypatch.setattr("entropy_probe.parallel.watch.GRACE_SECONDS", 0.5)


def one_rank(rank: int, size: int, port: int, directory, body) -> None:
    """A process of its own: what the command line does with a command's errors."""
    settings = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in settings.items()})
    sys.stderr = (directory / f"stderr-{rank}").open("w")
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


def launch(directory, size: int, body) -> tuple[list[int], list[str]]:
    """Exit codes and what each rank wrote to stderr."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=one_rank, args=(rank, size, port, directory, body)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a rank hangs"
    return [p.exitcode for p in processes], [(directory / f"stderr-{rank}").read_text() for rank in range(size)]


def compute(ranks: Ranks) -> None:
    """Work without any exchange, as long as a batch of a large model may take."""
    for _ in range(2000):
        time.sleep(0.01)


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
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path, killed, meanwhile):
    def body(ranks: Ranks) -> None:
        if ranks.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        meanwhile(ranks)

    start = time.monotonic()
    codes, errors = launch(tmp_path, 3, body)
    assert time.monotonic() - start < 15  # compute alone takes 20
    for rank in {0, 1, 2} - {killed}:
        assert codes[rank] == 1
        assert errors[rank].startswith(f"error: rank {killed} ended without saying why")
        assert errors[rank].count("\n") == 1


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
    assert codes == [code] * 3
    assert errors[failing].startswith(said)
    assert "".join(errors).count("\n") == 1


def test_the_same_error_on_all_ranks_is_said_once(tmp_path):
    def body(ranks: Ranks) -> None:
        raise ValueError("config: unknown key")

    codes, errors = launch(tmp_path, 4, body)
    assert codes == [2] * 4
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
    assert codes == [2] * 3
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
