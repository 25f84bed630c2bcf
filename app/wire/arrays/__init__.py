"""Arrays: .npy, .npz, safetensors, what torch.save wrote, bare bytes. Headers are checked before data is touched."""
