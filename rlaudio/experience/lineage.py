"""Which weights the present ones come from: tokens of abandoned weights are never fresh, whatever their number.

Each life of a run (an *incarnation*) begins with weights of an earlier one. Those are the same weights under two names:
(0, 50) and, in the life that was restored from them, (1, 50). What life 0 learned after them was abandoned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlaudio.types import WeightVersion


@dataclass(frozen=True, slots=True)
class Lineage:
    """The lives of a run.

    Attributes:
        origins: incarnation -> the weights it began with, as an earlier life named them; its own name for the first.
    """

    origins: Mapping[int, WeightVersion]

    def is_ancestor(self, version: WeightVersion, *, of: WeightVersion) -> bool:
        """Whether `of` was trained from `version`, or is it under another name."""
        version, of = self._first_name(version), self._first_name(of)
        while of.incarnation != version.incarnation:
            origin = self.origins[of.incarnation]
            if origin.incarnation == of.incarnation:
                return False
            of = origin
        return version.number <= of.number

    def _first_name(self, version: WeightVersion) -> WeightVersion:
        """What begins a life has the name that it had before."""
        while (origin := self.origins[version.incarnation]).number == version.number and origin != version:
            version = origin
        return version
