"""The line for a slot: live streams before those of full pace, and of each, what has begun before what has not.

Live is what plays in real time, and what only listens: it is read, and its slot is free again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from aloud.engine.stream import Stream

PLAYED = 0
"""The rank of what goes on with something that is being played."""


class WaitingLine:
    """Streams that wait for a slot; those of one rank are served in the order in which they came.

    count: how many they are, which is asked at every step.
    """

    def __init__(self) -> None:
        self._by_rank: tuple[deque[Stream], ...] = (deque(), deque(), deque(), deque())
        self.count = 0

    def __iter__(self) -> Iterator[Stream]:
        """In the order in which they get a slot."""
        for of_rank in self._by_rank:
            yield from of_rank

    @property
    def live(self) -> int:
        """How many are live."""
        return len(self._by_rank[0]) + len(self._by_rank[1])

    def add(self, stream: Stream) -> None:
        """At the end of its rank."""
        self._by_rank[rank(stream)].append(stream)
        self.count += 1

    def put_back(self, stream: Stream) -> None:
        """At the beginning of its rank."""
        self._by_rank[rank(stream)].appendleft(stream)
        self.count += 1

    def remove(self, stream: Stream) -> None:
        """Wherever it stands, if it does."""
        of_rank = self._by_rank[rank(stream)]
        if stream in of_rank:
            of_rank.remove(stream)
            self.count -= 1

    def pop(self) -> Stream:
        """The one that gets the next slot. Raises `StopIteration` when nobody waits."""
        stream = next(of_rank for of_rank in self._by_rank if of_rank).popleft()
        self.count -= 1
        return stream

    def without_slot(self, newcomer: Stream, room: int) -> int:
        """Refusable streams that will still wait, before `newcomer`, when `room` slots have been given out.

        Negative where slots are left for it. Those that were suspended had their slot, and count as no request; a live
        one does not wait for those of full pace.
        """
        before = [other for other in self if is_live(other) or not is_live(newcomer)]
        refusable = sum(other.is_refusable and other.suspended is None for other in before)
        return refusable - max(0, room - (len(before) - refusable))


def is_live(stream: Stream) -> bool:
    """Whether somebody waits for it who plays in real time, or who has just spoken."""
    return stream.job.lead_seconds is not None or stream.job.max_frames == 0


def rank(stream: Stream) -> int:
    """0 to 3; the lower goes first, to a slot and with its prompt."""
    has_begun = stream.job.goes_on or stream.suspended is not None
    return 2 * (not is_live(stream)) + (not has_begun)
