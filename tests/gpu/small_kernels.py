"""Runs every Triton kernel once on small shapes, forward and backward: the program that the sanitizer watches."""

import torch

from bench.suites.ops import backend_implementations, cases

if __name__ == "__main__":
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(device, dtype, "small", cache_bytes=0):
            implementation = backend_implementations(case).get("triton")
            if implementation is not None:
                implementation.call(*case.inputs[0])
                torch.cuda.synchronize()
                print(f"ran {case.name} {dtype}")
