"""On PYTHONPATH of a test's subprocess: torch.compile gives the function back (test_graphs.py traces it)."""

import functools
import sys

if "ipykernel_launcher" in sys.argv[0] or "-m" in sys.orig_argv:
    import torch

    @functools.wraps(torch.compile)
    def uncompiled(function, **_):
        return function

    torch.compile = uncompiled
