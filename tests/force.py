"""Make engines take ways that they take for other inputs, or on another device."""

import importlib


def in_chunks_of(n_elements, monkeypatch):
    """Make the portable engines work in chunks of so many numbers at most."""
    if hasattr(importlib.import_module("fastkd._backend"), "is_plain_on_cpu"):  # before the rebuild
        for name in ("divergence", "relational", "correlation", "_similarities"):
            module = importlib.import_module(f"fastkd.portable.{name}")
            for device in ("cpu", "meta"):
                monkeypatch.setitem(module._CHUNK_ELEMENTS, device, n_elements)
        small = importlib.import_module("fastkd.portable._small_divergence")
        monkeypatch.setattr(small, "_MOST_ELEMENTS", 0)
    from fastkd.portable import _chunks

    monkeypatch.setattr(_chunks, "LIMIT", n_elements)


def on_device_of(multiprocessors, monkeypatch, nvidia=False):
    """Let launch sites of rows divide the work for a device of so many multiprocessors."""
    kernels = importlib.import_module("fastkd.kernels.divergence")
    device = importlib.import_module("fastkd.kernels._launch").Device(multiprocessors, nvidia)
    monkeypatch.setattr(kernels, "device_of", lambda tensor: device)
