"""A limit on the steps of Python code that a model's author wrote: a chat template may loop as good as forever."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from quasar_core.errors import QuasarError

TEMPLATE_STEPS = 5_000_000  # a template takes some dozens for a message


@contextmanager
def limited_steps(what: str, steps: int = TEMPLATE_STEPS) -> Iterator[None]:
    """QuasarError where what runs within takes more steps (calls and lines of Python) than that.

    Steps, not seconds: whether a template is refused does not depend on how busy the machine is.
    """
    left = steps

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise QuasarError(f"{what} does not come to an end within {steps:,} steps.")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
