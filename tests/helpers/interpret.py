"""Triton's interpreter: the kernels on CPU tensors, one program after another; slow, for tests and dry runs."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

ON_GPU = "QUASAR_TEST_GPU"  # set where tests of a GPU alone run


def interpret_on_cpu() -> None:
    """From now on kernels run interpreted. To be called before the first kernel's module is imported.

    Triton decides when a function is decorated. Where Triton itself has been imported before, its own library's
    functions (sums, maxima) were decorated for a GPU, so they are decorated once more. Where tests of a GPU were asked
    for, the file that asks is skipped: theirs are the kernels that a GPU runs.
    """
    if os.environ.get(ON_GPU):
        pytest.skip("these kernels are interpreted", allow_module_level=True)
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
    _call_builtins_at_once(interpreter)
    _patch_the_language_once(interpreter, tl)
    _find_types_when_asked(interpreter, tl.core)
    _know_shapes(tl.core)
    _leave_equal_types_alone(interpreter.TritonSemantic)


def triton_steps() -> Any:
    """The steps of a pass on CUDA, as Triton's kernels that are interpreted.

    Attention's shares are merged two at a time: sixteen, of which a short text has one, take two thirds of a pass.
    """
    interpret_on_cpu()
    from quasar_core.kernels.triton import attention
    from quasar_core.models.cuda.triton_steps import TritonSteps

    class Steps(TritonSteps):
        def _attend(self, *inputs: Any) -> Any:
            with patch.object(attention, "_MERGED", 2):
                return super()._attend(*inputs)

    return Steps()


def _let_tensors_be_bounds(interpreter: Any) -> None:
    """Loops up to a number read in a kernel: the interpreter of Triton 3.6 calls int() on what NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _call_builtins_at_once(interpreter: Any) -> None:
    """Call what a builtin wraps, which the interpreter reaches by two more calls and a copy of what is named."""

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        semantic, wrapped = interpreter.TritonSemantic(builder), member
        if getattr(member, "__code__", None) is builtin_code:
            wrapped = member.__wrapped__

        def call(*args: Any, _semantic: Any = None, **named: Any) -> Any:
            return wrapped(*args, _semantic=semantic, **named)

        scope.set_attr(owner, name, call)

    builtin_code = interpreter.tl.core.builtin(lambda _semantic=None: None).__code__
    interpreter._patch_attr = patch_attribute


def _patch_the_language_once(interpreter: Any, language: Any) -> None:
    """Give the language's functions their interpreted form for good, and leave integers' overflows to the hardware.

    The interpreter does the first at every call of every function in a kernel, looking through some thousand names,
    and computes every sum of integers in 64 bits too, which a GPU does not. Both take longer than the kernels do.
    """
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    done = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: done


def _find_types_when_asked(interpreter: Any, core: Any) -> None:
    """Leave a tuple's type until something asks for it, and look an element's type up once.

    The interpreter makes tuples of every tensor's shape, and their types, which nothing reads, took a fifth of its
    time; a table of all types for every array took a tenth.
    """
    begin, plain, known = core.tuple.__init__, interpreter._get_np_dtype, dict[str, Any]()

    def begin_untyped(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            begin(self, args, type)

    def find_type(self: Any) -> Any:
        if "_type" not in vars(self):
            begin(self, self.values)
        return self._type

    def element_type(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = plain(scalar)
        return known[scalar.name]

    core.tuple.__init__ = begin_untyped
    core.tuple.type = property(find_type, lambda self, kind: vars(self).update(_type=kind))
    interpreter._get_np_dtype = element_type


def _know_shapes(core: Any) -> None:
    """Look up what follows from a shape, which every result has: the interpreter took half its time to find it anew."""
    begin_type, begin_tensor = core.block_type.__init__, core.tensor.__init__
    types, tensors = dict[tuple[int, ...], Any](), dict[int, Any]()

    def begin_known_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes not in types:
            begin_type(self, element_ty, shape)
            types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = types[sizes]
        self.name = f"<{text}, {element_ty}>"

    def begin_known_tensor(self: Any, handle: Any, type: Any) -> None:
        if not type.is_block():
            begin_tensor(self, handle, type)
            return
        if id(type.shape) not in tensors:
            begin_tensor(self, handle, type)
            tensors[id(type.shape)] = self.shape, self.numel, type.shape  # kept, so that no other has its number
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel, _ = tensors[id(type.shape)]

    core.block_type.__init__ = begin_known_type
    core.tensor.__init__ = begin_known_tensor


def _leave_equal_types_alone(semantic: Any) -> None:
    """Operands of one type and shape need neither a common one nor to be spread: most are, and that took a third."""
    check, spread = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value

    def check_unequal(self: Any, lhs: Any, rhs: Any, *allowed: Any, **named: Any) -> Any:
        tensors = isinstance(lhs, self.tensor) and isinstance(rhs, self.tensor)
        if tensors and lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr() and len(allowed) < 4:  # no division
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *allowed, **named)

    def spread_unequal(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return spread(self, lhs, rhs)

    semantic.binary_op_type_checking_impl = check_unequal
    semantic.broadcast_impl_value = spread_unequal
