"""The `native` backend: CPU kernels in C for what a question does once a layer and token."""
