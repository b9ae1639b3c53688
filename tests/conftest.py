"""Where there is no CUDA, Triton kernels run in its interpreter; that must be said before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
