"""What a log says of the starts in it: the judge of chaos must not take one start's word for another's."""

from __future__ import annotations

from tests.chaos.results import resumed_from

AFRESH = "step  1/14  loss 6.2\n"
FROM_8 = "12:00 INFO pretrain.run_parts: going on from /run/checkpoints/step-00000008: step 8, 2048 tokens seen\n"
FROM_9 = FROM_8.replace("8", "9")


def test_the_last_start_counts_and_one_that_began_afresh_is_not_taken_for_the_one_before() -> None:
    assert resumed_from(AFRESH) == 0
    assert resumed_from(FROM_8) == 8
    assert resumed_from(FROM_8 + FROM_9, earlier_starts_resumed=1) == 9
    assert resumed_from(FROM_8 + AFRESH, earlier_starts_resumed=1) == 0
    assert resumed_from(AFRESH + FROM_9) == 9
