"""The numbers a step is made of: noise, rounding, 8-bit and 4-bit floats, as pure functions of tensors."""
