"""What a process takes once, whatever it computes: `python -m orchestrator.calibration.first_use`.

Owns a process of its own, in which nothing has been computed yet. It writes two numbers: bytes that
libraries take when they are first used (resident, or of the GPU), and seconds before the first
document.
"""

from __future__ import annotations

import importlib
import os
import sys
import time


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """Memory of the GPU that is taken, but not by tensors or what the allocator keeps for them."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def main() -> int:
    """Import what an engine imports; then use, for the first time, what every document needs."""
    backend_name, device = sys.argv[1:]
    for module in ("orchestrator.engine", "orchestrator.answering"):
        importlib.import_module(module)
    before, began = resident_bytes(), time.perf_counter()
    # What renders chat templates, which loads no sooner.
    importlib.import_module("transformers.utils.chat_template_utils")
    start_s = time.perf_counter() - began
    _compute(backend_name, device)
    taken = resident_bytes() - before if device == "cpu" else gpu_bytes()
    sys.stdout.write(f"{taken} {start_s}\n")
    return 0


def _compute(backend_name: str, device: str) -> None:
    """A little of everything: libraries allocate their workspaces and threads when first called."""
    import torch

    from sparse_attn.api import find_backend

    backend = find_backend(backend_name)
    x, q = torch.randn(64, 64, device=device), torch.randn(64, 4, 64, device=device)
    k = torch.randn(2, 256, 64, device=device)
    with torch.inference_mode():
        backend.linear(x, x)
        backend.linear(x[:1], x)
        backend.attend(q, k, k, scale=0.1)
        backend.attend_causal(q, k[:, :64], k[:, :64], scale=0.1)


if __name__ == "__main__":
    sys.exit(main())
