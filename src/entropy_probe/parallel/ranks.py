"""Several processes as one: sums over the ranks of a process group. With one process everything is as it is.

What the ranks hold adds up: every rank has the sums of its own rows of a batch, and zeros for the rest. Sums are the
same on all ranks to the bit, so all take the same decisions from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

T = TypeVar("T")
JOIN_SECONDS = 300
"""How long to wait for all ranks to start."""
BUCKET_ELEMENTS = 2**26
"""A vector over parameters is summed in pieces of this size, so that no second copy of it is made."""


@runtime_checkable
class Ranks(Protocol):
    """The processes that work on one probe; every method but the properties is called by all of them together."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, of sums, counts and what there is per sequence or cluster; not of anything larger."""
        ...

    def sum_vector(self, vector: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The sum over ranks of a vector over named parameters.

        Args:
            vector: ``None`` is 0; what is ``None`` on every rank remains so.
            like: the parameters.
        """
        ...

    def agreeing(self) -> AbstractContextManager[None]:
        """Work that each rank does on its own; if it fails on any with bad input, it fails on all, with its error.

        Raises:
            ValueError: what was raised on the first rank that failed.
            MemoryError: the same.
        """
        ...

    def of_first(self, values: Tensor) -> Tensor:
        """The small tensor that rank 0 has; the others give one of its shape."""
        ...

    def broadcast(self, value: T) -> T:
        """What rank 0 has; the argument of the others is ignored."""
        ...

    def gather(self, value: T) -> list[T]:
        """A small object of every rank."""
        ...


@final
class _Alone:
    rank, size = 0, 1

    def of_first(self, values: Tensor) -> Tensor:
        return values

    def sum(self, values: Tensor) -> Tensor:
        return values

    def sum_vector(self, vector: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        return dict(vector)

    def agreeing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]


ALONE: Ranks = _Alone()
"""One process."""


@final
class ProcessGroup:
    """The ranks of torch's default process group, which must be initialised."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # NCCL alone cannot take tensors in host memory
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def _all_reduce(self, values: Tensor) -> None:
        """Sum in place; the one collective that tensors go through."""
        import torch.distributed as dist

        dist.all_reduce(values)

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        total = values.to(self._device, copy=True)
        if total.numel():
            self._all_reduce(total)
        return total.to(values.device)

    def sum_vector(self, vector: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """See :class:`Ranks`."""
        reached = self.sum(torch.tensor([x is not None for x in vector.values()], dtype=torch.float64))
        total: dict[str, Tensor | None] = dict.fromkeys(vector)
        bucket: list[tuple[str, Tensor]] = []
        for (name, x), is_reached in zip(vector.items(), reached.tolist(), strict=True):
            if not is_reached:
                continue
            if x is None:
                wide = torch.promote_types(like[name].dtype, torch.float32)
                x = torch.zeros(like[name].shape, dtype=wide, device=like[name].device)
            if bucket and not _fits(bucket, x):
                total |= self._sum_bucket(bucket)
                bucket = []
            bucket.append((name, x))
        return total | self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
        if not bucket:
            return {}
        flat = torch.cat([x.reshape(-1) for _, x in bucket])
        self._all_reduce(flat)
        pieces = flat.split([x.numel() for _, x in bucket])
        return {name: piece.view(x.shape) for (name, x), piece in zip(bucket, pieces, strict=True)}

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """See :class:`Ranks`."""
        failure: ValueError | MemoryError | None = None
        try:
            yield
        except (ValueError, MemoryError) as error:
            failure = error
        failed = torch.zeros(self.size, dtype=torch.float64)
        failed[self.rank] = failure is not None
        failed = self.sum(failed)
        if not bool(failed.any()):
            return
        first = int(failed.argmax())
        kind, message, notes = self.gather((type(failure), str(failure), getattr(failure, "__notes__", ())))[first]
        if failure is not None and self.rank == first:
            raise failure
        error = MemoryError(message) if issubclass(kind, MemoryError) else ValueError(message)
        for note in notes:
            error.add_note(note)
        raise error from failure

    def of_first(self, values: Tensor) -> Tensor:
        """The values of rank 0, of the same shape on all."""
        import torch.distributed as dist

        there = values.to(self._device, copy=True)
        if there.numel():
            dist.broadcast(there, src=0)
        return there.to(values.device)

    def broadcast(self, value: T) -> T:
        """See :class:`Ranks`."""
        import torch.distributed as dist

        box: list[Any] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@final
class SameWork:
    """Ranks that all do the same work on the same data, as those that hold the shards of one model: counted as one.

    What there is per sequence or cluster is whole on each of them, and gradients come summed from the model. Rank 0's
    numbers count, so that rounding cannot make the ranks decide differently.
    """

    rank, size = 0, 1

    def __init__(self, ranks: Ranks) -> None:
        self.sum = self.of_first = ranks.of_first
        self.agreeing, self.broadcast, self.gather = ranks.agreeing, ranks.broadcast, ranks.gather

    def sum_vector(self, vector: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """What was given."""
        return dict(vector)


def _fits(bucket: list[tuple[str, Tensor]], x: Tensor) -> bool:
    """Whether a tensor can be summed together with those before it."""
    first = bucket[0][1]
    elements = sum(y.numel() for _, y in bucket) + x.numel()
    return (x.dtype, x.device) == (first.dtype, first.device) and elements <= BUCKET_ELEMENTS


def joined_ranks() -> Ranks:
    """The ranks of the default process group.

    Raises:
        ValueError: if there is none.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "distributed: expected a process group, found none; call torch.distributed.init_process_group first, or "
            "leave distributed out"
        )
    return ProcessGroup() if dist.get_world_size() > 1 else ALONE


def join_ranks() -> tuple[Ranks, Any]:
    """Form a process group of the processes that a launcher started, and return it with its key-value store.

    Gloo carries what is in host memory and NCCL what is on a GPU; each rank takes the GPU of its local number.

    Raises:
        ValueError: if the environment lacks something that launchers set.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"environment: expected {', '.join(missing)} beside the other variables of a launcher, found none; start "
            "several processes with torchrun or accelerate launch"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
    # torchrun keeps its store when it restarts the ranks, with the keys of the attempt that failed
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return ProcessGroup(), store


def first_to_fail(store: Any, rank: int, code: int) -> tuple[int, int]:
    """Note in the process group's store that a rank fails; the rank that failed first, and its exit code.

    The launcher's store outlives the ranks. Where rank 0 holds it instead and is gone, every rank counts as the first.
    """
    from torch.distributed import DistError

    try:
        first, code_of_first = store.compare_set("first to fail", "", f"{rank} {code}").split()
    except DistError:
        return rank, code
    return int(first), int(code_of_first)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another rank has ended; gloo's own have no class but name the library."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave_ranks() -> None:
    """End the process group of :func:`join_ranks`; a process that exits with one may be aborted by its threads."""
    import torch.distributed as dist

    dist.destroy_process_group()
