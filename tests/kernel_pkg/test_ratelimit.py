"""RateLimit: how many lines an interval has, and what is said of those left out."""

from pykhuge.kernel.ratelimit import RateLimit

SECOND = 1_000_000_000


def test_an_interval_begins_with_its_first_line_and_has_room_for_a_burst() -> None:
    """The end of the interval still belongs to it; who missed out is counted once, by name."""
    limit, log = RateLimit("somebody", 60 * SECOND, 2), list[str]()
    allowed = [limit.allows(at * SECOND, log.append) for at in (5, 6, 7, 65)]
    assert allowed == [True, True, False, False]
    assert log == []
    assert limit.allows(65 * SECOND + 1, log.append)
    assert log == ["somebody: 2 callbacks suppressed"]
    assert limit.allows(200 * SECOND, log.append)
    assert log == ["somebody: 2 callbacks suppressed"]
