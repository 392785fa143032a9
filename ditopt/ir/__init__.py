"""The intermediate representation: functional ATen in torch.fx, and the structure above it."""
