"""Triton kernels. A launcher writes into the tensors it is given, allocates nothing and never waits for the device."""
