"""When something that failed is tried again, and how often that is said."""

from __future__ import annotations

from vllm_parallel_think.observability.metrics.outage import FIRST_PAUSE, LONGEST_PAUSE, Outage


class Clock:
    """Time that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_each_outage_is_said_once_each_way() -> None:
    clock = Clock()
    outage = Outage(clock)
    assert outage.due() and not outage.ended()
    said = []
    for _ in range(3):
        said.append(outage.failed())
        clock.now += LONGEST_PAUSE
    assert said == [True, False, False]
    assert [outage.ended(), outage.ended()] == [True, False]
    assert outage.failed()


def test_pauses_double_up_to_the_longest() -> None:
    clock = Clock()
    outage = Outage(clock)
    pauses = []
    for _ in range(9):
        outage.failed()
        begin = clock.now
        while not outage.due():
            clock.now += 1
        pauses.append(clock.now - begin)
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_what_goes_up_and_down_does_not_fill_the_log() -> None:
    clock = Clock()
    outage = Outage(clock)
    said = 0
    for _ in range(24 * 3600):
        clock.now += 1
        if outage.due():
            said += outage.ended()
            said += outage.failed()
    assert said < 2 * (24 * 3600 / LONGEST_PAUSE + 8)


def test_after_a_quiet_time_the_first_pause_is_short_again() -> None:
    clock = Clock()
    outage = Outage(clock)
    for _ in range(9):
        outage.failed()
    outage.ended()
    clock.now += LONGEST_PAUSE
    outage.failed()
    clock.now += FIRST_PAUSE
    assert outage.due()
