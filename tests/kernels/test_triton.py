"""Without a GPU, the Triton kernels run in the interpreter, which a process of its own turns on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.repository import ROOT


@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_attention.py runs it on the GPU")
def test_triton_in_its_interpreter() -> None:
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        + ["test_attention.py", "test_sharing.py"],
        cwd=here,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 80 and "skipped" not in result.stdout, result.stdout[-500:]
