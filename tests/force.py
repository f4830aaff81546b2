"""Make engines take ways that they take for other inputs, or on another device."""

import importlib

import torch

from fastkd import _heads
from fastkd.portable import _chunks, _pair_chunks


def in_chunks_of(n_elements, monkeypatch):
    """Make the portable engines work in chunks of so many numbers at most."""
    monkeypatch.setattr(_chunks, "LIMIT", n_elements)
    monkeypatch.setattr(_heads, "MOST_ROWS", max(1, n_elements // 16))


def on_device_of(multiprocessors, monkeypatch):
    """Make launch sites divide the work for this device with so many multiprocessors."""
    module = importlib.import_module("fastkd.kernels.device")
    here = module.device_of(torch.empty(0))._replace(multiprocessors=multiprocessors)
    monkeypatch.setattr(module, "Device", lambda *_: here)  # which the interpreter's is made of
    monkeypatch.setattr(module, "_describe", lambda *_: here)  # which describes any other


def through_chunks(monkeypatch, columns=16):
    """Make kernels of pairs go through cuBLAS: several chunks, several programs for a row."""
    chunks = importlib.import_module("fastkd.kernels.pairs.chunks")
    for name in ("launch", "soft_launch"):
        launch = importlib.import_module(f"fastkd.kernels.pairs.{name}")
        monkeypatch.setattr(launch, "tiling", lambda *arguments: None)
    monkeypatch.setattr(chunks, "LANES", columns // 2)
    monkeypatch.setattr(chunks, "TURNS", 2)
    monkeypatch.setattr(chunks, "_ROW_TURNS", 4)
    monkeypatch.setattr(chunks, "_LINE", 4)
    monkeypatch.setattr(chunks, "ELEMENTS", 20 * columns)


def multiplying_halves(monkeypatch):
    """Multiply half precision and sum in float32, as cuBLAS does."""

    def product(a, b, out):
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def multiplies(rows, half):
        return bool(half) and rows.dtype == torch.float32

    products = importlib.import_module("fastkd._products")
    for module, name in ((products, "product"), (_pair_chunks, "_product")):
        monkeypatch.setattr(module, "multiplies_halves", multiplies)
        monkeypatch.setattr(module, name, product)
