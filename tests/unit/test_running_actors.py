"""What a run that cannot be built leaves behind in a cluster: nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlaudio.config import RunConfig
from rlaudio.errors import ConfigError
from rlaudio.recipes import rl
from rlaudio.types import WeightVersion


class Places:
    """Room that somebody has to give back."""

    released = 0

    def options(self, role: str) -> dict[str, Any]:
        return {}

    own = options

    def taken_over(self, role: str, count: int) -> None: ...

    def release(self) -> None:
        self.released += 1


def test_room_is_given_back_when_the_parts_of_a_run_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config, places = RunConfig(), Places()
    config.model.path = "/nowhere"

    async def reserve(config: RunConfig, *, told: Callable[[str], None]) -> Places:
        return places

    async def start() -> None:
        async with rl.running_actors(config, version=WeightVersion(0, 0), checkpoint=None, told=print):
            pytest.fail("there is no such checkpoint")

    monkeypatch.setattr(rl, "reserve", reserve)
    with pytest.raises(ConfigError, match="'/nowhere' is not a folder"):
        asyncio.run(start())
    assert places.released == 1
