"""On a machine with native bfloat16, a whole run as if it had none: `auto` is float32 then, in child processes too.

    PYTHONPATH=tests/no_bfloat16 make test

Python imports a module of this name before anything else. Single tests take the fixture `native_bfloat16`.
"""

import torch

torch.cpu.get_capabilities = dict
