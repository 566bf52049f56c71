"""Supervised rows: a reply that cannot be sampled is refused before training, where it would be a loss of 1e26."""

import numpy as np
import pyarrow as pa
import pytest

from rlaudio.errors import DataError
from rlaudio.experience.builder import make_batch
from rlaudio.recipes.sft import require_learnable

BANNED = (3, 8)


def rows(*replies: list[int]) -> pa.RecordBatch:
    count = len(replies)
    return make_batch(
        prompt_id=[f"record-{index}" for index in range(count)],
        task=["t"] * count,
        group=list(range(count)),
        sibling=[0] * count,
        turn=[0] * count,
        prompt_ids=[np.array([3, 8], np.int32)] * count,
        response_ids=[np.array(reply, np.int32) for reply in replies],
        clips=[[]] * count,
        thinking=[None] * count,
        reply=[f"says {reply}" for reply in replies],
    )


def test_what_a_policy_may_sample_is_learned_whatever_it_is_asked() -> None:
    require_learnable(rows([1, 2], [5]), path="a.jsonl", banned=BANNED)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_reply_with_a_banned_id_is_refused_by_file_record_and_words(first: int) -> None:
    replies = [[1, 2, 4], [5, 6], [7]]
    replies[first][-1] = 8
    batch = rows([1], *replies).slice(1)
    with pytest.raises(DataError, match=rf"a\.jsonl: .* 1 ids .*'record-{first + 1}'.*says .*8\]"):
        require_learnable(batch, path="a.jsonl", banned=BANNED)
