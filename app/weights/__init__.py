"""Weight files <-> named tensors: safetensors, what torch.save writes, renames. Knows neither folders nor families."""
