"""On a machine with native bfloat16, a whole run as if it had none: `auto` is float32 then, in child processes too.

    PYTHONPATH=tests/no_bfloat16 make test

Python imports a module of this name before anything else. Single tests take the fixture `native_bfloat16`.
"""

import torch

found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
torch.cpu.get_capabilities = lambda: {name: able and "bf16" not in name for name, able in found.items()}
