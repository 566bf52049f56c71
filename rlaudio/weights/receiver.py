"""The receiving end, beside an engine: shares gather in host memory while it generates, then it swaps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlaudio.engines.base import Engine, SwapReport, WeightUpdate
from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.delta import Base, Delta
from rlaudio.weights.shares import Share, assemble

if TYPE_CHECKING:
    from rlaudio.weights.membership import Membership


class WeightReceiver:
    """Staging for one engine. Nothing in the engine changes before `swap`.

    Args:
        engine: running.
        keeps_base: keep the last shares in memory, so that the next ones may come as differences (`sync.delta`).

    Attributes:
        membership: of the group that weights come through, when they come by collectives.
    """

    def __init__(self, engine: Engine, *, keeps_base: bool = False) -> None:
        self._engine = engine
        self._base = Base() if keeps_base else None
        self._staged: WeightUpdate | None = None
        self._held: Sequence[Share | Delta] = ()
        self.membership: Membership | None = None

    @property
    def version(self) -> WeightVersion:
        """What the engine samples from."""
        return self._engine.version

    @property
    def base_version(self) -> WeightVersion | None:
        """What a difference may start from; None takes whole shares only."""
        return None if self._base is None else self._base.version

    async def stage(self, shares: Sequence[Share | Delta]) -> None:
        """Make whole tensors of every rank's share, in a thread.

        Raises:
            WeightSyncError: they do not make whole tensors, or a difference starts from other weights than are here.
                What was staged before is gone.
        """
        self._staged, self._held = None, ()
        self._staged = await asyncio.to_thread(self._whole, shares)

    def hold(self, shares: Sequence[Share | Delta]) -> None:
        """Shares that have come; the swap stages them first."""
        self._staged, self._held = None, shares

    def _whole(self, shares: Sequence[Share | Delta]) -> WeightUpdate:
        if self._base is not None:
            return assemble(self._base.take(shares)).to_update()
        whole = [share for share in shares if isinstance(share, Share)]
        if len(whole) < len(shares):
            raise WeightSyncError("a difference of weights came to a receiver that keeps no base: set sync.delta on it")
        return assemble(whole).to_update()

    def leave(self) -> None:
        """Leave the group that weights came through, if there is one: another learner's need another receiver."""
        membership, self.membership = self.membership, None
        if membership is not None:
            membership.leave()

    async def swap(self, version: WeightVersion, *, deadline_s: float) -> SwapReport:
        """Make live what is staged, or held.

        Raises:
            WeightSyncError: see `stage`; `version` is not what was staged, or the engine refuses or hangs.
        """
        if self._held:
            await self.stage(self._held)
        staged, self._staged = self._staged, None
        if staged is None or staged.version != version:
            found = "nothing" if staged is None else f"version {staged.version}"
            raise WeightSyncError(f"weights {version} cannot be swapped in: {found} was staged")
        try:
            return await self._engine.update_weights(staged, deadline_s=deadline_s)
        except WeightSyncError:
            if self._base is not None:
                self._base.forget()  # its bytes may be what was wrong
            raise


@dataclass(frozen=True, slots=True)
class Stage:
    """`SyncStep`: put shares beside the engine that came with the call; for a receiver in the same process."""

    shares: tuple[Share, ...]

    async def run(self, receiver: WeightReceiver) -> None:
        await receiver.stage(self.shares)


@dataclass(frozen=True, slots=True)
class Swap:
    """`SyncStep`: make live what was staged."""

    version: WeightVersion
    deadline_s: float

    async def run(self, receiver: WeightReceiver) -> SwapReport:
        return await receiver.swap(self.version, deadline_s=self.deadline_s)
