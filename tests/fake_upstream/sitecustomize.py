"""On PYTHONPATH of a test's subprocess: torch.compile traces, and leaves the C++ (minutes on the CPU) out."""

import functools
import sys

if "ipykernel_launcher" in sys.argv[0] or "-m" in sys.orig_argv:
    import torch

    compiled = torch.compile

    @functools.wraps(compiled)
    def traced(function, *, mode, **settings):
        return compiled(function, backend="eager", **settings)

    torch.compile = traced
