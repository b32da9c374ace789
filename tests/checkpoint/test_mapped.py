"""A tensor's map is the tensor, and its own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.mapped import map_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of several pages, of a few bytes, of none; so that most begin in the middle of a page."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    for dtype in DTYPES:
        for shape in ((3,), (70, 333), (2, 3, 5)):
            drawn = torch.randint(-2, 3, shape, generator=generator)
            tensors[f"{dtype}-{len(shape)}"] = drawn.to(dtype)
    path = tmp_path_factory.mktemp("mapped") / "model.safetensors"
    save_file(tensors, path)
    return path


def test_as_safetensors_reads_them(file: Path) -> None:
    reader = open_checkpoint(file)
    for name, wanted in load_file(file).items():
        found = map_tensor(reader, name)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8))


def test_data_that_begins_at_an_odd_byte(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    values = torch.tensor([1.0, 2.0, 3.0])
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    reader = open_checkpoint(path)
    assert reader.tensors["a"].offset % 4
    assert torch.equal(map_tensor(reader, "a"), values)


def test_writing_stays_in_this_process(file: Path) -> None:
    before, reader = file.read_bytes(), open_checkpoint(file)
    map_tensor(reader, "torch.float32-2").add_(1)
    assert file.read_bytes() == before
    assert torch.equal(map_tensor(reader, "torch.float32-2"), load_file(file)["torch.float32-2"])
