"""Curves of any number of points in bounded memory and space.

A curve keeps buckets of neighbouring points, each with its least and its greatest point, its sum
and its count. Whenever there are twice as many buckets as wanted, neighbours are merged. So a spike
of one step stays visible in a run of a million steps, and a page does not grow with its run.
"""

import math
from dataclasses import dataclass

MOST_POINTS = 400
"""Points that a drawn curve has at most."""
MOST_BUCKETS = MOST_POINTS // 2 - 1  # Two points each, and the first and the last point.

Point = tuple[float, float | None]
"""x and y; None is a gap in the curve."""
Known = tuple[float, float]


@dataclass
class _Bucket:
    x: float
    least: Known | None
    greatest: Known | None
    total: float
    known: int

    def merge(self, other: "_Bucket") -> None:
        """Take in the neighbour on the right."""
        if other.least is not None and other.greatest is not None:
            self.least = min(self.least or other.least, other.least, key=_height)
            self.greatest = max(self.greatest or other.greatest, other.greatest, key=_height)
        self.total += other.total
        self.known += other.known


class Curve:
    """Points in the order of x, added one by one."""

    def __init__(self) -> None:
        self.first: Known | None = None
        self.last: Known | None = None
        self.known = 0
        """Number of points with a value."""
        self.gaps = 0
        """Number of points without one."""
        self.total = 0.0
        self._buckets: list[_Bucket] = []
        self._points_a_bucket = 1
        self._in_last = 0

    def add(self, x: float, y: float | None) -> None:
        """Add a point to the right of all others; a value that is not finite is a gap."""
        if y is None or not math.isfinite(y):
            self.gaps += 1
            bucket = _Bucket(x, None, None, 0.0, 0)
        else:
            self.first = self.first or (x, y)
            self.last = (x, y)
            self.known += 1
            self.total += y
            bucket = _Bucket(x, (x, y), (x, y), y, 1)
        if self._buckets and self._in_last < self._points_a_bucket:
            self._buckets[-1].merge(bucket)
            self._in_last += 1
        else:
            self._buckets.append(bucket)
            self._in_last = 1
        if len(self._buckets) > 2 * MOST_BUCKETS:
            self._buckets = _halved(self._buckets)
            self._points_a_bucket *= 2
            self._in_last = self._points_a_bucket  # The next point begins a bucket.

    @property
    def least(self) -> Known | None:
        """The point of the smallest value."""
        return min((b.least for b in self._buckets if b.least), key=_height, default=None)

    @property
    def greatest(self) -> Known | None:
        """The point of the largest value."""
        return max((b.greatest for b in self._buckets if b.greatest), key=_height, default=None)

    @property
    def mean(self) -> float | None:
        """The mean of all values."""
        return self.total / self.known if self.known else None

    def points(self) -> list[Point]:
        """At most ``MOST_POINTS`` points: first, last, and each bucket's least and greatest."""
        buckets = self._buckets
        if len(buckets) > MOST_BUCKETS and self.known + self.gaps > MOST_POINTS:
            buckets = _halved(buckets)
        points: list[Point] = [self.first] if self.first else []
        for bucket in buckets:
            if bucket.least is None or bucket.greatest is None:
                points.append((bucket.x, None))
                continue
            for point in sorted({bucket.least, bucket.greatest}):
                if point not in (self.first, self.last):
                    points.append(point)
        if self.last and self.last != self.first:
            points.append(self.last)
        return sorted(points, key=lambda point: point[0])

    def means(self, about: int = 40) -> list[Point]:
        """Means of about that many stretches of equal length, each at its middle."""
        merged = [_copy(bucket) for bucket in self._buckets]
        while len(merged) > 2 * about:
            merged = _halved(merged)
        ends = [bucket.x for bucket in merged[1:]] + [self.last[0] if self.last else 0.0]
        return [
            ((bucket.x + end) / 2, bucket.total / bucket.known)
            for bucket, end in zip(merged, ends, strict=True)
            if bucket.known
        ]


def _halved(buckets: list[_Bucket]) -> list[_Bucket]:
    halved = []
    for number in range(0, len(buckets), 2):
        bucket = _copy(buckets[number])
        if number + 1 < len(buckets):
            bucket.merge(buckets[number + 1])
        halved.append(bucket)
    return halved


def _copy(bucket: _Bucket) -> _Bucket:
    return _Bucket(bucket.x, bucket.least, bucket.greatest, bucket.total, bucket.known)


def _height(point: Known) -> float:
    return point[1]
