"""A GPU whose memory is full."""

import os
import subprocess
import sys

from nullcuda import launch

# PyTorch's allocator of CUDA memory is chosen for a whole process, and only the usual one raises
# OutOfMemoryError.
SCRIPT = """
import sys

sys.path.insert(0, {tests!r})
import torch
from small import make_trainer, small_net


class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, image):
        torch.empty(20 << 30, dtype=torch.uint8, device=image.device)
        return self.net(image)


make_trainer(model=Hungry(), device="cuda", accumulation_steps=3).fit(1)
"""


def test_the_error_says_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(launch.SOURCE.parents[1])))
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING")
    done = subprocess.run(
        [sys.executable, launch.__file__, script], env=environ | {"NULLCUDA_CACHING": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB" in done.stderr
    advice = "Halve the loader's batch_size (2 to 1) and double accumulation_steps (3 to 6)"
    assert advice in done.stderr
