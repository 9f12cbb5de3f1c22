"""Tensors read without safetensors' own reader are its tensors, to the bit."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from nemo_aapo.errors import ConfigError
from nemo_aapo.models.reader import DTYPES, WeightFiles


def test_every_dtype_and_shape_comes_back_as_it_was_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    written = {
        f"{name} {shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (3,), (0, 4), (2, 3, 5))
    }
    halves = [dict(list(written.items())[k::2]) for k in (0, 1)]
    for number, half in enumerate(halves):
        safetensors.torch.save_file(half, tmp_path / f"{number}.safetensors")
    place = {name: f"{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    files = WeightFiles(tmp_path)
    assert set(files) == set(written)
    for name, tensor in files.items():
        assert (tensor.dtype, tensor.shape) == (written[name].dtype, written[name].shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), written[name].view(-1).view(torch.uint8))
    tensor.fill_(1)  # the caller's own


def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(9)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors: has \d+ bytes"):
        WeightFiles(tmp_path)
