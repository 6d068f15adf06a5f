"""Triton kernels, one file each; nothing else imports triton. `api.py` names what callers use."""
