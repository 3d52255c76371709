"""The paper's Table 2: a listening test built from a results folder's rows, served, and analysed."""

from importlib import util

from ..errors import InputError

FORMAT = "ssd-repro listening test 1"  # of key.json, page and ratings


def need(*modules: str) -> None:
    """InputError that names the extra, if one of its modules is not installed."""
    if missing := [module for module in modules if util.find_spec(module) is None]:
        raise InputError(f"{missing[0]} is missing: install the extra `ssd-repro[listen]`")
