"""Triton's interpreter: the kernels on CPU tensors, one program after another; slow, for tests and dry runs."""

import os
import sys
from typing import Any


def interpret_on_cpu() -> None:
    """From now on kernels run interpreted. To be called before the first kernel's module is imported.

    Triton decides when a function is decorated. Where Triton itself has been imported before, its own library's
    functions (sums, maxima) were decorated for a GPU, so they are decorated once more.
    """
    kernels = sys.modules.get("quasar_core.kernels.triton.language")
    if kernels is not None:
        if not kernels.INTERPRETED.value:
            raise RuntimeError("the kernels have been imported for a GPU before interpret_on_cpu()")
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    for owner in (tl.standard, tl, tl.tensor):
        for name, function in list(vars(owner).items()):
            if isinstance(function, JITFunction):
                setattr(owner, name, interpreter.InterpretedFunction(function.fn))
    _let_tensors_be_bounds(interpreter)


def _let_tensors_be_bounds(interpreter: Any) -> None:
    """Loops up to a number read in a kernel: the interpreter of Triton 3.6 calls int() on what NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
