"""Tokenizers in 16 bits: what stays float32, what it does to the words, and the gate of `auto`; and that the quick form
of a VQGAN is taming's function."""

import contextlib
import copy
import dataclasses
import functools
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import SMALL_LIGHT, golden_vqgan, pictures
from torch import nn

from mae_dat.attacks.symbolic import code_gradient
from mae_dat.config.errors import ConfigError
from mae_dat.models.tokenizer import VQGAN, VQGAN_PRESETS, LightTokenizer, VisualTokenizer, load_tokenizer
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.models.tokenizer.blocks import Upsample
from mae_dat.models.tokenizer.precision import (
    PRECISIONS,
    agreement,
    first_accurate_precision,
    generated_images,
    in_precision,
)

CPU = torch.device("cpu")


@functools.cache
def embedded() -> VisualTokenizer:
    return load_tokenizer().prepare(CPU)


# ---- the same function ----


@pytest.mark.parametrize("name", VQGAN_PRESETS)
def test_encoder_and_decoder_are_those_of_taming(name: str) -> None:
    from taming.modules.diffusionmodules.model import Decoder, Encoder

    config = dataclasses.replace(VQGAN_PRESETS[name], ch=32, num_words=8)
    ours = VQGAN(config).freeze()
    settings = {
        **{"double_z": False, "in_channels": 3, "out_ch": 3, "resolution": 256, "dropout": 0.0},
        **{key: getattr(config, key) for key in ("z_channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        encoder, decoder = Encoder(**settings).eval(), Decoder(**settings).eval()
    encoder.load_state_dict(ours.get_submodule("encoder").state_dict())
    decoder.load_state_dict(ours.get_submodule("decoder").state_dict())
    image = torch.rand(2, 3, 32, 48)
    latent = torch.randn(2, config.z_channels, 32 // config.factor, 48 // config.factor)
    # Some fifty convolutions of values around 1 in float32, whose order of sums is the processor's: without AVX-512
    # single values differ by 1.4e-5.
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=5e-5)
    for form in (ours, ours.prepare(CPU)):
        with torch.no_grad():
            close(form.encoder(image), encoder(image))
            close(form.decoder(latent), decoder(latent))


def test_folded_upsampling_is_enlarging_and_convolving() -> None:
    layer, x = Upsample(5).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    plain = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x), plain, rtol=1e-6, atol=1e-6)  # the kernel is folded in float32
    (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), x) for out in (layer(x), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- 16 bits ----


@pytest.mark.parametrize("make", [lambda: LightTokenizer(SMALL_LIGHT).freeze(), lambda: copy.deepcopy(golden_vqgan())])
@pytest.mark.parametrize("name", PRECISIONS)
def test_ends_stay_float32_and_keys_the_same(make: Callable[[], VisualTokenizer], name: str) -> None:
    before = make()
    tokenizer = in_precision(make(), CPU, name)
    convolutions = {
        part: [layer.weight.dtype for layer in tokenizer.get_submodule(part).modules() if isinstance(layer, nn.Conv2d)]
        for part in ("encoder", "decoder")
    }
    for dtypes, inner in zip(convolutions.values(), PRECISIONS[name], strict=True):
        # The order of a VQGAN's modules: the first convolution, ..., the last.
        assert (dtypes[0], dtypes[-1]) == (torch.float32, torch.float32)
        assert set(dtypes[1:-1]) == {inner}
    assert tokenizer.state_dict().keys() == before.state_dict().keys()
    image = torch.rand(1, 3, 16, 24)
    assert tokenizer.latent(image).dtype == tokenizer.reconstruct(image).dtype == torch.float32


def test_a_step_below_a_gray_level_reaches_the_first_layer_whole() -> None:
    """In bfloat16 such a step would be rounded to one of twice its norm, half of it elsewhere."""
    tokenizer = in_precision(copy.deepcopy(golden_vqgan()), CPU, "bf16")
    image = 2 * pictures(2, size=64) - 1
    delta = torch.randn_like(image) * 0.13 / 255
    first = tokenizer.get_submodule("encoder.conv_in")
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        seen, true = first(image + delta) - first(image), F.conv2d(delta, first.weight, padding=1)
    correlation = F.cosine_similarity(seen.flatten(), true.flatten(), dim=0)
    assert correlation > 0.999
    assert (
        F.cosine_similarity(((image + delta).bfloat16() - image.bfloat16()).flatten().float(), delta.flatten(), 0) < 0.7
    )


def test_words_of_the_embedded_tokenizer_in_16_bits() -> None:
    image = pictures(40)
    delta = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    delta = 2 * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]
    half = agreement(embedded(), in_precision(load_tokenizer(), CPU, "fp16"), image, delta)
    brain = agreement(embedded(), in_precision(load_tokenizer(), CPU, "bf16"), image, delta)
    decoder = agreement(embedded(), in_precision(load_tokenizer(), CPU, "bf16_decoder"), image, delta)
    assert decoder.flips == 0
    assert 0 < decoder.pixels < 0.5 / 255
    assert half.flips < brain.flips < 0.02
    assert half.flips < 0.005
    assert half.overlap_same_image > brain.overlap_same_image > 0.8
    assert brain.fast_changes == pytest.approx(brain.exact_changes, rel=0.1)
    exact = agreement(embedded(), load_tokenizer().prepare(CPU), image, delta)
    assert (exact.flips, exact.overlap, exact.pixels) == (0, 1, 0)


def test_auto_is_float32_on_a_cpu() -> None:
    weights = in_precision(load_tokenizer(), CPU).parameters()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_the_gate_takes_what_keeps_the_words_and_refuses_what_overflows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert first_accurate_precision(embedded(), CPU, ("fp16",)) == "fp16"
    loud = copy.deepcopy(embedded())
    with torch.no_grad():
        loud.get_parameter("decoder.1.conv2.weight").mul_(1e7)  # beyond the largest number of 16 bits
    assert first_accurate_precision(loud, CPU, ("fp16",)) == "fp32"
    assert "in fp16" in caplog.text
    assert "tokenizer in float32" in caplog.text
    assert generated_images(embedded()).shape == (4, 3, 128, 128)


def test_exact_float32_restores_what_the_run_has_set() -> None:
    parts = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [part.allow_tf32 for part in parts]
    with pytest.raises(ZeroDivisionError), exact_float32():
        assert [part.allow_tf32 for part in parts] == [False, False]
        raise ZeroDivisionError
    assert [part.allow_tf32 for part in parts] == before


def test_words_and_pixels_never_see_tf32() -> None:
    tokenizer, parts = load_tokenizer(), [torch.backends.cudnn, torch.backends.cuda.matmul]
    seen: list[bool] = []
    for part in (tokenizer.get_submodule("encoder"), tokenizer.get_submodule("decoder")):
        part.register_forward_pre_hook(lambda module, given: seen.extend(one.allow_tf32 for one in parts))
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = True
        words = tokenizer.encode(pictures(1))
        tokenizer.decode(words)
        code_gradient(words, lambda view: view.square().sum(), tokenizer)
    finally:
        for part, was in zip(parts, before, strict=True):
            part.allow_tf32 = was
    assert seen == [False] * 6


def test_without_a_compiler_the_flag_is_named() -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ConfigError, match=r"--tokenizer_compile needs a C\+\+ compiler"):
        load_tokenizer().prepare(CPU, compiled=True)


@pytest.mark.slow
def test_compiled_words_are_the_same() -> None:
    image = pictures(4)
    compiled = load_tokenizer().prepare(CPU, compiled=True)
    assert compiled.state_dict().keys() == embedded().state_dict().keys()
    assert (compiled.encode(image) != embedded().encode(image)).float().mean() < 0.01
    torch.testing.assert_close(compiled.reconstruct(image), embedded().reconstruct(image), rtol=0, atol=0.02)
