"""Operations on tensors: each file has the mathematics, the reference in PyTorch and the entry that callers use."""
