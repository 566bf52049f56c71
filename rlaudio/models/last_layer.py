"""A random small checkpoint that says something: its output projection is fitted to a few sequences, nothing else is.

A policy of random weights never closes its reasoning and a random judge never gives a verdict that can be read, so a
loop around them has nothing to do. Encoder, adaptor and layers stay as they were drawn: what is said has the form of
the sequences, and means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rlaudio.errors import CheckpointError
from rlaudio.models.base import AudioPolicy, ModelFamily
from rlaudio.types import ClipSpan, FloatArray, IntArray

HEAD = "lm_head.weight"
_STEPS = 60
_DECAY = 3e-3
"""Strong enough that sequences which were not shown have the same form."""
_SMOOTHING = 0.1
"""Of the targets, so that not every sampled reply is one of those shown."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One sequence.

    Attributes:
        prompt_ids: [P]; response_ids: [R], to be learned.
        clips: the prompt's placeholders.
    """

    prompt_ids: IntArray
    response_ids: IntArray
    clips: tuple[ClipSpan, ...] = ()


def fit_last_layer(
    family: ModelFamily, shown: Sequence[Shown], *, sounds: Mapping[str, FloatArray], exact: bool = False
) -> None:
    """Fit the output projection of the checkpoint `family.path` to the responses, and write it there again.

    Args:
        sounds: hash -> [N] samples at 16 kHz, of every clip in `shown`.
        exact: as closely as it can be fitted; otherwise a share of other words stays likely.

    Raises:
        CheckpointError: the checkpoint has no output projection of its own.
    """
    module = family.load_module(dtype=torch.float32)
    assert isinstance(module, torch.nn.Module)
    heads = [parameter for name, parameter in module.named_parameters() if name.endswith(HEAD)]
    if len(heads) != 1:
        raise CheckpointError(f"{family.path} has {len(heads)} tensors {HEAD}: a small checkpoint needs its own one")
    hidden, targets = _states(module, family, shown, sounds=sounds)
    # Of unit length, so that one learning rate does for every width.
    scale = hidden.norm(dim=1).mean()
    weight = torch.zeros_like(heads[0], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = F.linear(hidden / scale, weight)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if exact else _SMOOTHING)
        loss = loss + _DECAY * weight.square().sum() / len(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        heads[0].copy_(weight / scale)
    family.save(module, Path(family.path), dtype=torch.float32)


def _states(
    module: AudioPolicy, family: ModelFamily, shown: Sequence[Shown], *, sounds: Mapping[str, FloatArray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, hidden] states in front of every response token, and [n] those tokens."""
    hidden, targets = [], []
    encoded: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for one in shown:
            for span in one.clips:
                if span.sha256 not in encoded:
                    encoded[span.sha256] = module.encode([family.mel(sounds[span.sha256])])[0]
            ids = torch.tensor([[*one.prompt_ids.tolist(), *one.response_ids.tolist()]])
            states = module.forward(
                ids,
                states=[encoded[span.sha256] for span in one.clips],
                spans=[(0, span.start, span.end) for span in one.clips],
            )
            first = len(one.prompt_ids)
            hidden.append(states[0, first - 1 : -1])
            targets.append(ids[0, first:])
    return torch.cat(hidden), torch.cat(targets)
