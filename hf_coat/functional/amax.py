"""The largest magnitude of a weight, from the optimizer that wrote it to the linear that quantizes it.

With one scale per tensor (the COAT paper, arXiv 2410.19313 section 4) a weight's codes take two passes over it, the
first one for its amax. An optimizer that has all new values at hand anyway saves that pass. A linear asks as it
quantizes its weight; the optimizer's next step hands over what was asked for since the last one. It costs nothing
where nobody asks.
"""

from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(eq=False)
class _Handover:
    """Between one weight's optimizer and its linear. ``amax``, float32 [1, 1], is of the values that it had at
    ``state``."""

    asked: bool = False
    state: tuple[int, int, int] | None = None
    amax: torch.Tensor | None = None


_handovers = WeakTensorKeyDictionary()  # not on the weights, which are copied and pickled
_steps = 0  # of all torch optimizers together


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _state(weight: torch.Tensor, steps: int) -> tuple[int, int, int]:
    return steps, weight._version, weight.data_ptr()


def ask_amax(weight: torch.Tensor) -> torch.Tensor | None:
    """The amax of a weight as it is now, float32 [1, 1], if its optimizer handed it over; and ask for the next one.

    It counts until any torch optimizer has stepped again, and only while the version counter and the address of the
    weight are what they were. An edit through ``.data`` moves neither: who makes one between an optimizer's step and
    the next forward sets ``CoatConfig(cache_weights=False)``, so that nothing about weights is remembered.
    """
    handover = _handovers.setdefault(weight, _Handover())
    handover.asked = True
    if handover.state is None or handover.state != _state(weight, _steps):
        return None
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return None if captured else handover.amax  # a graph would read this number for ever


def amax_asked(weight: torch.Tensor) -> bool:
    """Whether a linear asked for the amax of this weight since the last time that this was called, just before the
    weight is written to."""
    handover = _handovers.get(weight) if _handovers else None
    if handover is None:
        return False
    asked, handover.asked = handover.asked, False
    handover.state = handover.amax = None
    return asked


def hand_amax(weight: torch.Tensor, amax: torch.Tensor) -> None:
    """Hand over the amax, float32 [1, 1], of a weight as it is now, in the middle of an optimizer's step."""
    handover = _handovers[weight]
    handover.state, handover.amax = _state(weight, _steps + 1), amax
