"""Kernels without a GPU: in Triton's interpreter, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).parents[1]


def check_interpreted(*arguments):
    """Run tests in a process of their own: the setting is read when triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


@contextmanager
def multiplying_bfloat16():
    """Let Triton's interpreter multiply bfloat16, which it keeps as bits, as what it stands for."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create(builder, a, b, *others):
        return create_dot(builder, widened(a), widened(b), *others)

    with patch.object(InterpreterBuilder, "create_dot", create):
        yield


def assert_compiles(kernel, types, constants, n_warps, aligned=(), **more_options):
    """Compile for a GPU of compute capability 9.0, and return what came of it.

    Arguments without a type are *i32; those that are aligned are so by 16, as is known at launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
    }
    by_place = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": n_warps, "enable_fp_fusion": False, **more_options}
    known = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=by_place, attrs=known)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled
