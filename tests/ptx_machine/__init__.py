"""Runs PTX on the CPU: what nvcc and Triton's compiler make of the GPU kernels, instruction by instruction.

For tests on machines without a GPU. Tested is what stands between the sources and the hardware: inline assembly,
layouts of fragments and of matrix descriptors, barriers, asynchronous copies and products, addresses (`machine`), and
whether barriers order all that touches shared memory (`races`). Not tested: ptxas, the hardware's own arithmetic
(products are exact here, special functions rounded once), weakly ordered global memory, and time.
"""
