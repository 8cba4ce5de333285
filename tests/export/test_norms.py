"""Group norm in stages: equal to torch, in torch and where a runtime adds up half a million elements one by one."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from d2zero_export.norms import StagedGroupNorm, in_stages


@pytest.fixture
def norm() -> nn.GroupNorm:
    torch.manual_seed(0)
    made = nn.GroupNorm(4, 32)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def half_padding(height: int, width: int) -> Tensor:
    """Maps whose channels have means and spreads of their own, the lower half one value each."""
    random = torch.Generator().manual_seed(1)
    maps = torch.randn(1, 32, height, width, generator=random) * torch.rand(1, 32, 1, 1, generator=random)
    maps[:, :, height // 2 :] = 0
    return maps + torch.randn(1, 32, 1, 1, generator=random)


def test_it_is_group_norm(norm: nn.GroupNorm) -> None:
    maps = torch.cat([half_padding(24, 40), torch.randn(2, 32, 24, 40) * 30 + 5])
    with torch.inference_mode():
        torch.testing.assert_close(StagedGroupNorm(norm)(maps), norm(maps), atol=1e-5, rtol=1e-5)


def test_one_value_everywhere_is_a_number(norm: nn.GroupNorm) -> None:
    with torch.inference_mode():
        found = StagedGroupNorm(norm)(torch.full((1, 32, 7, 9), 321.7))
    assert found.isfinite().all()


def test_all_norms_of_a_module_are_replaced(norm: nn.GroupNorm) -> None:
    plain, biased = (nn.Sequential(nn.Conv2d(3, 32, 3, bias=bias), deepcopy(norm), nn.ReLU()) for bias in (False, True))
    module = nn.Sequential(plain, biased, nn.LayerNorm(4))
    maps, before = torch.randn(2, 3, 20, 30), deepcopy(module)
    assert in_stages(module) == 2 and isinstance(module.get_submodule("1.1"), StagedGroupNorm)
    assert plain[0].bias is not None and torch.equal(biased.get_parameter("0.bias"), before.get_parameter("1.0.bias"))
    with torch.inference_mode():
        for name in ("0", "1"):
            torch.testing.assert_close(
                module.get_submodule(name)(maps), before.get_submodule(name)(maps), atol=1e-5, rtol=0
            )
    assert in_stages(nn.ReLU()) == 0


@pytest.mark.slow
def test_large_maps_with_padding_in_onnxruntime(norm: nn.GroupNorm, tmp_path: Path) -> None:
    maps = half_padding(200, 304)
    right = nn.functional.group_norm(maps.double(), 4, norm.weight.double(), norm.bias.double()).detach().numpy()

    def error(module: nn.Module, name: str) -> float:
        height, width = torch.export.Dim("height", min=8), torch.export.Dim("width", min=8)
        program = torch.onnx.export(
            module.eval(),
            (maps[:, :, :24, :40],),
            input_names=["maps"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({2: height, 3: width},),
        )
        assert program is not None
        program.save(tmp_path / name)
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"maps": maps.numpy()})
        return float(np.abs(found - right).mean() / np.abs(right).mean())

    assert error(norm, "plain.onnx") > 1e-5  # or this module has no purpose any more
    assert error(StagedGroupNorm(norm), "staged.onnx") < 1e-6
