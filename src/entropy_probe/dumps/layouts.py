"""The layouts of dumps that are known: by our names the fields of each trainer's records.

A new one is an entry of :data:`LAYOUTS`. What its table cannot say is a function from the trainer's record to one that
the table fits (``prepare``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from entropy_probe.sampling import ScaleRewards

Record = Mapping[str, Any]
LISTS = ("mask", "advantage", "sampled", "old", "reference")
"""Our names of what a layout may have for every token."""


@dataclass(frozen=True)
class Layout:
    """How one trainer writes a rollout."""

    name: str  # of the trainer, for people
    needs: frozenset[str]  # the fields that a record of it has, and together no other trainer's
    # by our names the trainer's. ``prompt`` and ``response`` are token ids, text or messages; ``tokens`` is both, told
    # apart by ``response_length`` or by where the ``mask`` begins, and cut at ``length``. Per token ``mask``,
    # ``advantage`` (or a number), and log-probabilities (``sampled``, ``old``, ``reference``); per rollout ``step``,
    # ``group``, ``reward``, ``kept`` (0: masked out of the loss), ``truncated``, ``entropy`` (nats per token) and
    # ``microbatch``
    fields: Mapping[str, str]
    # what lists per token run over: the whole sequence, or the response
    over: Literal["sequence", "response"] = "response"
    scale: ScaleRewards = "group"  # what the trainer divides centred rewards by, by default
    epsilon: float = 1e-6  # what it adds to that
    # what a record is before it is taken by ``fields``: several records, one, or none
    prepare: Callable[[Record], Iterator[Record]] | None = None
    step_in_name: str | None = None  # a pattern of the file's name with the step, where records do not have it
    rewards_by_name: bool = False  # whether other fields that are numbers are rewards, one a reward function
    # whether prompts of text have gone through the chat template, with (``marked``) or without special tokens
    # (``plain``); ``None``: text as the data set has it, or either
    rendered: Literal["marked", "plain"] | None = None
    # whether responses of text have their special tokens, the end token too, and ``prompt_length`` and
    # ``response_length`` say of how many tokens both are
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(sorted(self.needs))})"


def _rows_of_table(record: Record) -> Iterator[Record]:
    """ms-swift: a table to a line, as columns."""
    columns = {name: values for name, values in record.items() if isinstance(values, list)}
    size = len(columns["prompt"])
    for name, values in columns.items():
        if len(values) != size:
            raise ValueError(f"{name}: expected {size} entries, as prompt has, got {len(values)}")
    for i in range(size):
        yield {name: values[i] for name, values in columns.items()}


def _without_tools(record: Record) -> Iterator[Record]:
    """open-instruct: which tokens are a tool's is not in the record."""
    info = record.get("request_info")
    if isinstance(info, Mapping) and info.get("tool_calleds"):
        raise ValueError(
            "request_info.tool_calleds: expected no calls of tools, whose output is not told apart, got some"
        )
    yield {**record, "truncated": record.get("finish_reason") == "length"}


def _trained(record: Record) -> Iterator[Record]:
    """NeMo-RL: with dynamic sampling the rewards that were trained on are the filtered ones."""
    yield {**record, "rewards": record.get("filtered_rewards", record.get("rewards"))}


def _numbered(record: Record) -> Iterator[Record]:
    """prime-rl: the microbatch by accumulation step and rank; of one run alone the step is the trainer's."""
    place = (record.get("micro_step"), record.get("rank"))
    microbatch = None if None in place else "{}.{}".format(*place)
    yield {"export_step": record.get("step"), **record, "microbatch": microbatch}


def _of_rollout(record: Record) -> Iterator[Record]:
    """slime: all samples of a rollout in one record; those of other generations of the prompt are removed by a flag."""
    for sample in record["samples"]:
        reward = sample.get("reward")
        if isinstance(reward, Mapping) and len(reward) == 1:
            reward = next(iter(reward.values()))
        yield {
            **sample,
            "reward": reward,
            "rollout_id": record["rollout_id"],
            "kept": not sample.get("remove_sample", False),
            "truncated": sample.get("status") == "truncated",
        }


def _rows_of_batch(batch: Record) -> Iterator[Record]:
    """SkyRL: padded tensors, those of the response in line with the last columns; rows that pad the batch are last."""
    told = batch.get("metadata") or {}
    width, uids = batch["response_mask"].shape[1], told.get("uids")
    per_token = {k: x for k, x in batch.items() if isinstance(x, Tensor) and x.shape == batch["response_mask"].shape}
    for i in range(len(batch["sequences"]) - (told.get("pad_size") or 0)):
        real, responded = batch["attention_mask"][i].bool(), batch["response_mask"][i].bool()
        columns = real[-width:] & (responded.cumsum(0) > 0)
        row = {name: values[i][columns].tolist() for name, values in per_token.items()}
        rewards = row.pop("rewards", None)
        yield row | {
            "tokens": batch["sequences"][i][real].tolist(),
            "response_length": int(columns.sum()),
            "reward": None if rewards is None else sum(rewards),
            "uid": None if uids is None else uids[i],
        }


def _of_version(record: Record) -> Iterator[Record]:
    """AReaL: rollouts of the policy after so many updates are those of the next one, where training waits for them."""
    counts: tuple[Any, ...] = (record.get("tail_version"), record.get("seqlen"), record.get("prompt_len"))
    if not all(type(count) is int for count in counts):
        raise ValueError(f"tail_version, seqlen, prompt_len: expected whole numbers, got {counts!r:.60}")
    version, length, prompt = counts
    yield {**record, "step": version + 1, "response_length": length - prompt}


def _fields(text: str) -> Mapping[str, str]:
    """``ours=theirs`` by name; one word where both are the same."""
    return {pair.partition("=")[0]: pair.rpartition("=")[2] for pair in text.split()}


LAYOUTS = (
    Layout(
        "TRL",
        frozenset({"step", "prompt", "completion", "advantage"}),
        _fields("step prompt response=completion prompt_ids response_ids=completion_ids advantage"),
        epsilon=1e-4,
        rewards_by_name=True,
    ),
    Layout(
        "ms-swift",
        frozenset({"prompt", "completion", "advantages"}),
        _fields("step prompt response=completion advantage=advantages entropy"),
        epsilon=1e-4,
        prepare=_rows_of_table,
        rewards_by_name=True,
        rendered="marked",
    ),
    Layout(
        "verl",
        frozenset({"input", "output", "score"}),
        _fields("step prompt=input response=output reward=score"),
        step_in_name=r"^(\d+)\.jsonl",
        rendered="plain",
    ),
    Layout(
        "open-instruct",
        frozenset({"prompt_tokens", "response_tokens", "reward", "advantage"}),
        _fields(
            "step prompt=prompt_tokens response=response_tokens group=prompt_idx reward advantage sampled=logprobs "
            "truncated"
        ),
        prepare=_without_tools,
    ),
    Layout(
        "NeMo-RL",
        frozenset({"token_ids", "token_loss_mask", "sample_loss_mask"}),
        _fields(
            "tokens=token_ids length=input_lengths mask=token_loss_mask kept=sample_loss_mask reward=rewards "
            "advantage=advantages sampled=generation_logprobs old=prev_logprobs"
        ),
        over="sequence",
        prepare=_trained,
        step_in_name=r"train_data_step(\d+)",
    ),
    Layout(
        "prime-rl",
        frozenset({"token_ids", "loss_mask", "inference_logprobs"}),
        _fields(
            "step=export_step tokens=token_ids mask=loss_mask advantage=advantages sampled=inference_logprobs "
            "microbatch"
        ),
        over="sequence",
        scale="none",
        prepare=_numbered,
    ),
    Layout(
        "slime",
        frozenset({"rollout_id", "samples"}),
        _fields(
            "step=rollout_id tokens response_length mask=loss_mask group=group_index reward sampled=rollout_log_probs "
            "kept truncated"
        ),
        prepare=_of_rollout,
    ),
    Layout(
        "SkyRL",
        frozenset({"sequences", "attention_mask", "loss_mask", "response_mask"}),
        _fields(
            "tokens response_length mask=loss_mask group=uid reward advantage=advantages sampled=rollout_logprobs "
            "old=action_log_probs reference=base_action_log_probs"
        ),
        prepare=_rows_of_batch,
        step_in_name=r"global_step_(\d+)",
    ),
    Layout(
        "AReaL",
        frozenset({"task_id", "seqlen", "prompt_len", "tail_version"}),
        _fields("step prompt response=completion group=task_id reward prompt_length=prompt_len response_length"),
        epsilon=1e-5,
        prepare=_of_version,
        rendered="marked",
        whole=True,
    ),
    Layout(
        "verifiers",
        frozenset({"example_id", "prompt", "completion", "reward"}),
        _fields("prompt response=completion group=example_id reward truncated=is_truncated"),
        scale="none",
    ),
)


def recognised(fields: Collection[str]) -> Layout:
    """The layout of records with these fields.

    Raises:
        ValueError: if none has them, or several.
    """
    fitting = [layout for layout in LAYOUTS if layout.needs <= set(fields)]
    if len(fitting) == 1:
        return fitting[0]
    seen = ", ".join(sorted(map(str, fields))[:20]) or "none"
    if fitting:
        raise ValueError(
            f"expected the fields of one trainer's rollouts, got those of {' and '.join(map(str, fitting))} (fields: "
            f"{seen}); leave out those that are not of the trainer"
        )
    known = "; ".join(map(str, LAYOUTS))
    raise ValueError(
        f"expected the fields of a known dump, got {seen}; known are {known}; else write the batch with "
        "Rollouts.to_parquet"
    )
