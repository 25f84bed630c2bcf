"""One command each: `make bench` on a CPU, `make bench-gpu` on a GPU. Peers are measured in the same run."""
