"""The private names of torch that the package uses, each with its reason; nothing else imports one."""

import torch

# One launch, or one call, for many tensors. torch.optim is built on these, and torch has no public name for them.
foreach_add = torch._foreach_add_
foreach_copy = torch._foreach_copy_
foreach_mul = torch._foreach_mul_
foreach_norm = torch._foreach_norm
