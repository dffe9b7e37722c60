"""Channel statistics, distances, colors and spectra, each against a reference or a property that it must have."""

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from mae_dat.analysis.statistics import (
    Moments,
    correlation,
    correlations,
    distinct_colors,
    frechet_distance,
    norm_layers,
    power_spectrum,
    record_moments,
)
from mae_dat.config.errors import ConfigError


def test_moments_of_batches_are_those_of_the_whole() -> None:
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    moments = Moments()
    for part in values.split(12):
        moments.add(part)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.variance, values.var(0, correction=0), rtol=1e-9, atol=0)


def test_a_batch_norm_is_watched_as_it_counts_itself() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.ReLU())
    image = torch.rand(8, 3, 9, 9)
    layers = norm_layers(network)
    found = {name: Moments() for name in layers}
    with record_moments(layers, found):
        network(image)
    own = network[1]
    assert isinstance(own, nn.BatchNorm2d)
    assert own.running_mean is not None
    assert own.running_var is not None
    count = 8 * 7 * 7
    assert found["1"].count == count
    torch.testing.assert_close(found["1"].mean.float(), own.running_mean)
    torch.testing.assert_close((found["1"].variance * count / (count - 1)).float(), own.running_var)
    network(image)
    assert found["1"].count == count, "the hooks are gone after the block"


@pytest.mark.parametrize(("layer", "shape"), [(nn.LayerNorm(6), (4, 10, 6)), (LayerNorm2d(6), (4, 6, 5, 2))])
def test_channels_are_found_wherever_a_norm_has_them(layer: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = {"0": Moments()}
    network = nn.Sequential(layer)
    with record_moments(norm_layers(network), found):
        network(values)
    channels = values.movedim(1, -1) if len(shape) == 4 else values
    torch.testing.assert_close(found["0"].mean.float(), channels.reshape(-1, 6).mean(0))


def test_batch_norms_alone_are_looked_at_where_there_are_any() -> None:
    assert list(norm_layers(nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3)))) == ["1"]
    with pytest.raises(ConfigError, match="no BatchNorm"):
        norm_layers(nn.Sequential(nn.Linear(2, 2)))


def test_correlation_is_numpys() -> None:
    one, other = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-6)
    assert correlation(one, 3 * one + 2) == pytest.approx(1)


def test_correlations_name_layer_and_moment() -> None:
    clean, other = Moments(), Moments()
    values = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    clean.add(values)
    other.add(-values)
    assert correlations({"a": clean}, {"a": other}) == {"a": {"mean": pytest.approx(-1), "variance": pytest.approx(1)}}


def test_frechet_distance_of_gaussians() -> None:
    values = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (values - values.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(values.T.cov())).T
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(values, values + 2) == pytest.approx(5 * 4)
    assert frechet_distance(values, 3 * values) == pytest.approx(5 * (3 - 1) ** 2)
    assert frechet_distance(values, 3 * values + 1) == pytest.approx(frechet_distance(3 * values + 1, values))
    with pytest.raises(ConfigError, match="at least 2"):
        frechet_distance(values[:1], values)


def test_distinct_colors() -> None:
    image = torch.zeros(2, 3, 2, 2)
    image[1, 0, 0, 0], image[1, 2, 0, 0], image[1, 2, 1, 1] = 1 / 255, 1, 0.4 / 255  # the last one rounds to black
    assert distinct_colors(image).tolist() == [1, 2]


def test_a_wave_has_its_power_at_its_frequency() -> None:
    columns = torch.arange(64)
    wave = torch.cos(2 * torch.pi * columns * 20 / 64).expand(1, 3, 64, 64)  # 0.3125 cycles a pixel
    power = power_spectrum(wave, bins=8)
    assert int(power.argmax()) == int(0.3125 * 2 * 8)
    assert float(power.max()) > 1e6 * float(power.sort().values[-2])


def test_white_noise_has_a_flat_spectrum_of_its_variance() -> None:
    noise = 0.5 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        power_spectrum(noise, bins=4), torch.full((4,), 0.25, dtype=torch.float64), rtol=0.02, atol=0
    )
