"""Importing the package is harmless; asked in fresh interpreters, where no earlier test has imported anything."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUARD = """
import socket, sys

def refuse(*args, **kwargs):
    raise RuntimeError("the network was used at import")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
CHECK = """
heavy = {"triton", "flash_attn", "bitsandbytes", "gguf", "matplotlib", "datasets", "lm_eval"} & set(sys.modules)
if "torch._dynamo" in sys.modules:  # transformers imports it with its models, and it takes triton where there is one
    heavy.discard("triton")
heavy |= {name for name in sys.modules if name.startswith("infer_patch.kernels.") and "triton" in name}
if heavy:
    sys.exit(f"imported: {sorted(heavy)}")
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    sys.exit("CUDA was initialised")
"""


def run(body):
    done = subprocess.run(
        [sys.executable, "-c", GUARD + body + CHECK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_its_methods():
    run("import infer_patch; infer_patch.patch, infer_patch.Plan; infer_patch.methods()")


def test_importing_the_command_line():
    run("import infer_patch.cli")


def test_help_needs_no_torch():
    run("import infer_patch.cli; assert 'torch' not in sys.modules, 'torch was imported'")
