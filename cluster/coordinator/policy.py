"""The newest weights of the student, for its samplers, and which of them one has loaded.

Plain state without locks: the coordinator's event loop is the only one to touch it. A publication
holds references to Ray's object store, of which the coordinator is the owner: they outlast the
worker that made them, and an older version is freed when a newer one takes its place.
"""

from typing import Any


class PolicyVersions:
    """Publications by rank 0, numbered by a serial: a version (steps) returns after a restart."""

    def __init__(self) -> None:
        self.newest: dict[str, Any] | None = None
        self._serial = 0
        self._files: list[Any] = []
        self._valid_from = 0
        self._loaded: int | None = None

    def publish(self, version: int, weights: dict[str, Any], restored: bool) -> None:
        """New weights. ``restored``: they may be older than what the sampler has loaded, so that
        this counts for nothing. ``weights["files"]`` is kept for later publications without it.
        """
        self._serial += 1
        self._files = weights.get("files") or self._files
        self.newest = {
            **weights,
            "files": self._files,
            "serial": self._serial,
            "version": version,
        }
        if restored:
            self._valid_from, self._loaded = self._serial, None

    def is_newer(self, serial: int) -> bool:
        """Whether there is a publication after ``serial``."""
        return self._serial > serial

    def loaded(self, serial: int, version: int) -> None:
        """A sampler answers with a publication now. One from before a restart is ignored."""
        if serial >= self._valid_from:
            self._loaded = max(version, version if self._loaded is None else self._loaded)

    def may_write(self, oldest_version: int | None) -> bool:
        """Whether a sampler has weights of that version or newer; None: no need of any.

        One is enough: another waits for its own before it answers (`Sampler.sample`).
        """
        if oldest_version is None:
            return True
        return self._loaded is not None and self._loaded >= oldest_version
