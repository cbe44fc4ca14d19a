"""What a run makes of the batches it is given before anything else."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from entropy_probe.analyses.admission import (
    admit,
    draws_of,
    end_tokens,
    evaluation_clusters,
    in_groups,
    joined,
)
from entropy_probe.analyses.columns import after_end
from tests.analyses.batches import END, admitted, batch
from tests.notes import texts


def test_what_is_connected_gets_the_smallest_id():
    ids = torch.tensor([7, 3, 5, 9, 3, 8])
    assert joined(ids, ["a", "b", "a", None, "c", "c"]).tolist() == [5, 3, 5, 9, 3, 3]
    assert joined(ids, [None] * 6).tolist() == ids.tolist()
    # a chain: 9 and 2 meet through 5
    assert joined(torch.tensor([9, 5, 5, 2]), ["x", "x", "y", "y"]).tolist() == [2, 2, 2, 2]


def test_prompts_with_the_same_tokens_are_one_whatever_pads_them():
    given = batch([[1, 2], [2, 1], [1, 2], [4, 1, 2]], [[3], [3], [5, 6, 6], [3]], [40, 30, 20, 10])
    found = admitted(given)
    assert found.rollouts.prompt_ids.tolist() == [20, 30, 20, 10]
    assert texts(found.notes) == [
        "update: 4 prompt ids have 3 distinct prompts: equal prompts are one, under the smallest of its ids "
        "(merge_equal_prompts keeps them apart)"
    ]
    assert given.prompt_ids.tolist() == [40, 30, 20, 10]
    apart = admitted(given, merge=False)
    assert apart.rollouts.prompt_ids.tolist() == [40, 30, 20, 10]
    assert texts(apart.notes) == []
    assert texts(admitted(found.rollouts).notes) == []


def test_a_masked_out_response_keeps_to_the_prompts_of_its_id():
    given = batch([[1], [1], [2], [2]], [[3], [3, 3], [3], [3]], [5, 4, 5, 6], [[1], [0, 0], [1], [0]])
    # 5 answers two prompts, so they are one; where a masked-out response begins nothing says
    assert admitted(given).rollouts.prompt_ids.tolist() == [5, 4, 5, 6]
    same = batch([[1], [1], [1]], [[3], [4], [3]], [5, 4, 4], [[1], [1], [0]])
    assert admitted(same).rollouts.prompt_ids.tolist() == [4, 4, 4]


def test_rows_of_a_trajectory_belong_together():
    given = batch([[1], [1, 3, 2], [4], [4, 3, 2]], [[3], [3], [3], [3]], [1, 2, 3, 4],
                  trajectory_ids=torch.tensor([8, 8, 6, 6]))  # fmt: skip
    found = admitted(given)
    assert found.rollouts.prompt_ids.tolist() == [1, 1, 3, 3]
    assert "4 sequences are parts of 2 trajectories" in texts(found.notes)[0]
    assert found.not_modelled == []
    as_evaluation = admitted(given, "evaluation")
    assert "prompts of a trajectory's later sequences" in as_evaluation.not_modelled[0]
    name, clusters, _ = evaluation_clusters(as_evaluation.rollouts, "auto", grouped=in_groups(given))
    assert (name, clusters.count, clusters.index.tolist()) == ("trajectory", 2, [1, 1, 0, 0])
    repeated = replace(given, prompt_ids=torch.tensor([1, 1, 3, 3]), trajectory_ids=torch.tensor([8, 5, 6, 6]))
    *_, (said,) = evaluation_clusters(repeated, "auto", grouped=in_groups(repeated))
    assert "every trajectory counts as independent" in said.text
    whole = admitted(replace(given, trajectory_ids=torch.arange(4)), "evaluation")
    assert (texts(whole.notes), whole.not_modelled) == ([], [])
    assert not in_groups(whole.rollouts)


def test_groups_are_counted_in_trajectories():
    """Every prompt has two trajectories, of one and of two rows: prompts are the units, and not by rows."""
    prompts = [[p, *more] for p in range(1, 9) for more in ([], [], [7, 7])]
    given = batch(prompts, [[3]] * 24, [p for p in range(8) for _ in range(3)],
                  trajectory_ids=torch.tensor([2 * p + k for p in range(8) for k in (0, 1, 1)]))  # fmt: skip
    found = admitted(given, "evaluation").rollouts
    name, clusters, _ = evaluation_clusters(found, "auto", grouped=in_groups(found))
    assert (name, clusters.count) == ("prompt", 8)
    assert evaluation_clusters(given, "sequence", grouped=True)[:1] == ("trajectory",)
    assert draws_of(given).count == 16


def test_tokens_behind_an_end_token_count_within_a_run_only():
    given = batch(
        [[END], [1], [1], [1]],
        [[3, END], [3, END, 4, 5], [3, END, 4, 5, END], [END, END, 3]],
        [1, 2, 3, 4],
        # the third: its turn ends, a tool answers, the policy goes on
        [[1, 1], [1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 0, 0]],
    )
    behind = after_end(given, [END])
    assert behind.sum(1).tolist() == [0, 2, 0, 0]
    assert given.input_ids[behind].tolist() == [4, 5]
    (said,) = texts(admitted(given, merge=False, end_ids=[END]).notes)
    assert said.startswith("update: 2 response tokens of 1 of 4 sequences follow an end token (9) directly")
    assert texts(admitted(given, merge=False).notes) == []


def test_a_batch_without_any_end_token():
    given = batch([[1]] * 3, [[3, 4], [3], [3, 4]], [1, 2, 3], [[1, 1], [1], [0, 0]])
    (said,) = texts(admitted(given, merge=False, end_ids=[END, 8]).notes)
    assert said.startswith("update: no response has an end token (9, 8), though 1 of 2 are shorter than the longest")
    longer = batch([[1]] * 2, [[3, 4], [3, 4]], [1, 2])
    assert texts(admitted(longer, merge=False, end_ids=[END], longest=2).notes) == []
    assert texts(admit(longer, "update", False, [END], 3, stop_texts=True).notes) == []
    assert "2 of 2 are shorter" in texts(admitted(longer, merge=False, end_ids=[END], longest=3).notes)[0]
    ended = batch([[1]] * 2, [[3, 4], [END]], [1, 2])
    assert texts(admitted(ended, merge=False, end_ids=[END]).notes) == []


def test_a_step_on_advantages_of_0_is_momentum_alone():
    given = batch([[1], [2]], [[3, 4], [END]], [1, 2], advantages=torch.zeros(2))
    assert texts(admitted(given).notes) == [
        "update: every advantage is 0, so the policy gradient is 0: only momentum (and a KL term) is left"
    ]
    assert texts(admitted(given, "evaluation").notes) == []
    assert texts(admitted(replace(given, advantages=torch.tensor([0.0, 1.0]))).notes) == []


def test_where_end_tokens_come_from():
    class Settings:
        def __init__(self, ids):
            self.eos_token_id = ids

    model = nn.Linear(1, 1)
    assert end_tokens(model) == ()
    assert end_tokens(model, [4]) == (4,)
    model.config = Settings(2)
    assert end_tokens(model, [4, 2]) == (2, 4)
    model.generation_config = Settings([7, 5])
    assert end_tokens(model) == (5, 7)


def test_entropy_is_that_of_all_responses():
    given = batch([[1]] * 3, [[3]] * 3, [1, 2, 3], [[1], [0], [1]])
    with pytest.raises(ValueError, match=r"evaluation: expected response tokens in every .* 1 of 3 \(index 1 first\)"):
        admitted(given, "evaluation")
    assert "1 of 3 responses are masked out" in texts(admitted(given, "batch", merge=False).notes)[0]
    assert texts(admitted(given, merge=False).notes) == []


@pytest.mark.parametrize(
    ("ids", "mixed"),
    [
        ([0, 0, 1, 1, 2, 2], None),
        ([5, 5, 3, 3, 1, 1], None),  # other names of the same groups
        ([0, 1, 1, 2, 2, 0], 3),  # shifted by a row
        ([0, 1, 0, 1, 2, 2], 2),
        ([0, 0, 0, 0, 2, 2], None),  # turns of a conversation have prompts of their own
    ],
)
def test_responses_under_other_prompts_ids_are_noticed(ids, mixed):
    given = batch([[1, 2]] * 2 + [[3, 4]] * 2 + [[5, 6]] * 2, [[7], [8]] * 3, ids)
    for merge in (True, False):
        said = texts(admitted(given, merge=merge).notes)
        expected = [f"update: {mixed} prompt ids are each given to sequences with different prompts"] if mixed else []
        assert [text.partition(", which")[0] for text in said] == expected
