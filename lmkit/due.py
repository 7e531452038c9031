"""What is to be done after a step, on which all processes of a run have to agree."""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.distributed import World
from lmkit.horizon import Horizon

ANOTHER = "a request to another process"
"""Who asked to stop or save, where it was not this process that was asked."""


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    done: bool
    log: bool
    evaluate: bool
    save: bool
    offer: bool
    stop: str | None
    """What asked to stop."""
    asked: str | None
    """The signal that asked to save."""

    @property
    def anything(self) -> bool:
        """Whether something is, for which the reports of all steps so far have to be looked at first."""
        return self.log or self.evaluate or self.save or self.offer or self.stop is not None or self.asked is not None

    def agreed(self, world: World, line: Horizon) -> tuple[Due, Horizon]:
        """What the first process finds due, and the end of the run as it sees it; a request may come to any of them."""
        if world.size == 1:
            return self, line
        end = line.per_step, line.fit_step, line.fit_progress
        own = [self.done, self.log, self.evaluate, self.save, self.offer, *end]
        found, requests = world.agree(own, [self.stop is not None, self.asked is not None])
        done, log, evaluate, save, offer = map(bool, found[:5])
        mine = self.stop, self.asked
        stop, asked = (name or ANOTHER if made else None for name, made in zip(mine, requests, strict=True))
        return Due(done, log, evaluate, save, offer, stop, asked), Horizon(found[5], int(found[6]), found[7])
