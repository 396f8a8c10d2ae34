"""PSNR, SSIM and LPIPS: by hand, and against torchmetrics, scipy and the package's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from models.errors import ModelError, WeightsError
from models.metrics.images import psnr, ssim
from models.metrics.means import Means, bin_name, view_groups
from models.metrics.perceptual import load_lpips


def pictures(size: int = 40, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    true = torch.rand(2, 3, size, size, generator=g)
    return (true + noise * torch.randn(true.shape, generator=g)).clamp(0, 1), true


def test_psnr_by_hand_and_by_torchmetrics() -> None:
    black = torch.zeros(1, 3, 4, 4)
    assert psnr(black + 0.1, black).tolist() == [pytest.approx(20.0)]
    assert psnr(black, black).tolist() == [float("inf")]
    predicted, true = pictures()
    for one in range(2):
        expected = peak_signal_noise_ratio(predicted[one], true[one], data_range=1.0)
        assert float(psnr(predicted, true)[one]) == pytest.approx(float(expected), rel=1e-5)


def test_ssim_padded_is_that_of_torchmetrics() -> None:
    predicted, true = pictures()
    expected = structural_similarity_index_measure(predicted, true, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(predicted, true, variant="ssim_padded").float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["ssim", "ssim_sample_covariance"])
def test_ssim_is_the_published_definition(variant: str) -> None:
    predicted, true = pictures()
    a, b = predicted[0].double().numpy(), true[0].double().numpy()

    def blur(x):
        return gaussian_filter(x, sigma=(0, 1.5, 1.5), truncate=3.5)

    factor = 121 / 120 if variant == "ssim_sample_covariance" else 1.0
    ma, mb = blur(a), blur(b)
    va, vb, vab = (
        factor * (blur(x * y) - mx * my) for x, y, mx, my in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb))
    )
    values = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    expected = values[:, 5:-5, 5:-5].mean()
    assert float(ssim(predicted, true, variant=variant)[0]) == pytest.approx(expected, rel=1e-9)


def test_equal_pictures_have_ssim_one() -> None:
    _, true = pictures()
    assert ssim(true, true).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (torch.full((2, 3, 40, 40), 2.0), r"pictures lie in \[0, 1\], these lie in \[2, 2\]"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.uint8), "divide bytes by 255"),
        (torch.zeros(2, 3, 40, 30), "two batches of pictures"),
        (torch.zeros(2, 40, 40, 3), "two batches of pictures"),
    ],
)
def test_pictures_of_another_form_are_refused(predicted: Tensor, message: str) -> None:
    _, true = pictures()
    for score in (psnr, ssim):
        with pytest.raises(ValueError, match=message):
            score(predicted, true)


def test_ssim_names_what_it_cannot_do() -> None:
    small = torch.zeros(1, 3, 10, 20)
    with pytest.raises(ValueError, match="at least 11x11 pixels"):
        ssim(small, small)
    with pytest.raises(ValueError, match="unknown variant of SSIM 'ms_ssim'"):
        ssim(*pictures(), variant="ms_ssim")


# --- LPIPS -----------------------------------------------------------------------------------------------------------


def test_lpips_with_the_trunk_by_path(weights_dir: Path) -> None:
    lpips = load_lpips(weights_dir / "alexnet")
    predicted, true = pictures(64)
    distance = lpips(predicted, true)
    assert distance.shape == (2,)
    assert lpips(true, true).tolist() == [0.0, 0.0]
    # What the package gives for [-1, 1]; [0, 1] without mapping would be about half of it.
    expected = lpips.network(predicted * 2 - 1, true * 2 - 1).flatten()
    torch.testing.assert_close(distance, expected)
    assert bool((distance > 0).all())
    with pytest.raises(ValueError, match=r"pictures lie in \[0, 1\]"):
        lpips(predicted * 2 - 1, true)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    # The package's dropout stays off, also inside of a module that is trained.
    assert not any(module.training for module in torch.nn.Sequential(lpips).train()[0].modules())


def test_lpips_passes_gradients_to_the_picture(weights_dir: Path) -> None:
    predicted, true = pictures(64)
    predicted.requires_grad_()
    load_lpips(weights_dir / "alexnet" / "features.safetensors")(predicted, true).sum().backward()
    assert predicted.grad is not None
    assert float(predicted.grad.abs().sum()) > 0


def test_lpips_reads_a_whole_classifier_and_leaves_the_global_generator_alone(
    weights_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    trunk = load_file(weights_dir / "alexnet" / "features.safetensors")
    torch.save({**trunk, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    before = torch.get_rng_state()
    lpips = load_lpips(tmp_path / "alexnet.pth")
    assert torch.equal(before, torch.get_rng_state())
    predicted, true = pictures(64)
    torch.testing.assert_close(lpips(predicted, true), load_lpips(weights_dir / "alexnet")(predicted, true))


def test_a_random_trunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no path is given for the trunk of LPIPS"):
        load_lpips("")
    with pytest.raises(WeightsError, match="there is no such file"):
        load_lpips(tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match="holds 0 safetensors files"):
        load_lpips(tmp_path)
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"does not hold the trunk of LPIPS(.|\n)*missing"):
        load_lpips(tmp_path / "part.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"not a state dict")
    with pytest.raises(WeightsError, match="cannot be read as trunk of LPIPS"):
        load_lpips(tmp_path / "broken.pth")
    with pytest.raises(ModelError, match="unknown trunk of LPIPS 'resnet'"):
        load_lpips(tmp_path / "part.safetensors", trunk="resnet")


# --- means -----------------------------------------------------------------------------------------------------------


def test_means_by_group_add_up_over_ranks() -> None:
    a, b = Means(), Means()
    a.update({"x": torch.tensor([1.0, 3.0])}, [["near"], ["near", "left"]])
    b.update({"x": torch.tensor([float("nan"), 5.0]), "y": torch.tensor([2.0, 2.0])}, [["near"], []])
    a.merge(b)
    assert a.compute() == {"x": 3.0, "x@near": 2.0, "x@left": 3.0, "y": 2.0, "y@near": 2.0}
    assert (a.count("x"), a.count("x@near"), a.count("z")) == (3, 2, 0)
    with pytest.raises(ValueError, match="one score and one list of groups a sample"):
        a.update({"x": torch.tensor([1.0])}, [[], []])


def test_bins_include_their_upper_end() -> None:
    assert [bin_name(v, [15, 30], "angle") for v in (3, 15, 15.1, 30, 31)] == [
        "angle<=15", "angle<=15", "angle<=30", "angle<=30", "angle>30",
    ]  # fmt: skip
    assert bin_name(3, [], "angle") == "angle"


def test_pairs_are_grouped_by_how_far_the_camera_moved() -> None:
    pose = torch.eye(4).repeat(2, 2, 1, 1)
    pose[0, :, :3, 3] = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.3, 0.4]])
    quarter = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    pose[1, 0, :3, :3], pose[1, 1, :3, 3] = quarter, torch.tensor([0.0, 0.0, 3.0])
    groups = view_groups(pose, [15.0, 60.0], [0.6, 1.0])
    assert groups == [["angle<=15", "distance<=0.6"], ["angle>60", "distance>1"]]
