"""Arrays: .npy, .npz, safetensors, what torch.save wrote, bare bytes; the header is checked before the data is touched."""
