"""TensorRT: the backend, and what it needs of the GPU and of CUDA."""
