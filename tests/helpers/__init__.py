"""What tests share: ranks as processes, replicas whose gradients are given, tensors that hold the awkward values."""
