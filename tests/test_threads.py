"""OpenMP's waiting threads: set before torch is loaded, unless the user has set them."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

CODE = """
import builtins, os, sys
assert "torch" not in sys.modules
load = builtins.__import__

def spy(name, *args, **kwargs):
    if name == "torch" and "torch" not in sys.modules:
        print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)
    return load(name, *args, **kwargs)

builtins.__import__ = spy
import {command}
"""


@pytest.mark.parametrize(
    ("user", "value"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
    ids=["default", "spincount", "policy"],
)
@pytest.mark.parametrize(
    "command", ["pretrain", "finetune", "linprobe", "visualize", "embed", "export"]
)
def test_commands_limit_spinning_before_torch_is_loaded(command, user, value):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: text for name, text in os.environ.items() if name not in names} | user
    code = CODE.format(command=f"main_{command}")
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True
    )
    assert out.strip() == value
