"""Import this before any module of Triton kernels: they then run on CPU tensors, whoever imported Triton first."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from helpers.interpret import interpret_on_cpu

interpret_on_cpu()
