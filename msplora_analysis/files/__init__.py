"""Bytes and named tensors: addresses of files, local and remote, and the tensors in them."""
