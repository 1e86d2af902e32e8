"""What data says of a model's tensors: Gram matrices of layer inputs, Fisher information. Made once, merged with later."""
