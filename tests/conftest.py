"""Said once for all tests, before anything else is imported."""

import os

import torch

# Test processes run side by side: more threads than one each would wait for each other (seen: 91 s instead of 0.6 s).
torch.set_num_threads(1)

# Where there is no CUDA, Triton kernels run in its interpreter; it reads this when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
