"""CardioMM: what it computes, what it learns from, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import fft2c, ifft2c
from fedcmr_shared.kspace.masks import Sampling, acs_mask, make_mask
from fedcmr_shared.models.cardiomm import CONFIGS, CardioMM, CardioMMConfig, UNetConfig

TEXT_WIDTH = 6
_UNET = UNetConfig(
    features=4,
    widths=(5, 6),
    prompt_widths=(2, 3),
    prompt_sizes=(8, 4),
    encoder_blocks=(1, 1),
    decoder_blocks=(1, 1),
    skip_blocks=(1, 1),
    bottleneck_blocks=1,
)
MICRO = CardioMMConfig(
    cascades=2, unet=_UNET, sensitivity=_UNET, text_width=TEXT_WIDTH, embedding_width=5
)
RESIDUAL = replace(
    MICRO,
    unet=replace(_UNET, residual=True, pixel_unshuffle=2),
    sensitivity=replace(_UNET, residual=True),
    consistency_start=0.1,
)


def _model(config=MICRO, *, adapted=True, **options):
    torch.manual_seed(3)
    model = CardioMM(config, **options).double()
    if adapted:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adapter.s" in name:  # scale and shift start at zero
                    parameter.normal_(std=0.5)
                elif "squeeze" in name:  # of each opposite pair one survives the rectifier
                    parameter[1::2] = -parameter[::2]
    return model


def _coil_images(batch, coils, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(-1, 1, rows)[:, None], torch.linspace(-1, 1, columns)
    centre = 0.5 * torch.randn(batch, coils, 2, 1, 1, generator=generator)
    sensitivity = torch.exp(-((y - centre[:, :, 0]) ** 2) - (x - centre[:, :, 1]) ** 2)
    phase = torch.rand(batch, coils, 1, 1, generator=generator) * 6
    size = 0.3 + 0.5 * torch.rand(batch, 1, 1, 1, generator=generator)
    anatomy = (y**2 + x**2 < size).double() + (y**2 + 2 * x**2 < size / 3).double()
    return anatomy * sensitivity.double() * torch.exp(1j * phase.double())


def _batch(batch=1, coils=3, rows=24, columns=20, seed=0):
    """Return the arguments of a forward pass, in double precision."""
    kspace = fft2c(_coil_images(batch, coils, rows, columns, seed))
    sampling = Sampling("uniform", 4, 6)
    mask = make_mask(sampling, phase_encodes=rows, readout=columns, frames=1, seed=0)
    mask = torch.from_numpy(mask)[None].expand(batch, -1, -1, -1)
    acs = torch.from_numpy(acs_mask(sampling, rows, columns)).expand_as(mask)
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(2, batch, TEXT_WIDTH, dtype=torch.float64, generator=generator)
    return {
        "kspace": kspace * mask,
        "mask": mask,
        "acs": acs,
        "metadata_text": texts[0],
        "sampling_text": texts[1],
    }


def _close(first, second, **tolerances):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


# Size


def _counts(module):
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, trains in sizes if not trains)


def test_paper_size_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = CardioMM(CONFIGS["paper"])
    heads = _counts(model.metadata_head)[0] + _counts(model.sampling_head)[0]
    trainable, frozen = _counts(model)
    assert len(model.cascades) == 10
    assert heads == 2 * (512 * 256 + 256)
    assert trainable - heads == pytest.approx(63.2e6, rel=0.01)
    assert frozen == pytest.approx(5.2e6, rel=0.01)
    assert trainable + frozen == pytest.approx(68.7e6, rel=0.01)
    assert _counts(model.cascades[0])[0] == pytest.approx(6.16e6, rel=0.01)
    assert _counts(model.sensitivity)[0] == pytest.approx(1.56e6, rel=0.01)


@pytest.mark.parametrize(("size", "lowest", "highest"), [("tiny", 1e5, 4e5), ("small", 5e5, 1.5e6)])
def test_small_sizes_stay_small(size, lowest, highest):
    with torch.device("meta"):
        assert lowest < _counts(CardioMM(CONFIGS[size]))[0] < highest


def test_only_the_prompt_banks_are_frozen():
    frozen = {name for name, p in _model().named_parameters() if not p.requires_grad}
    assert frozen == {name for name in _model().state_dict() if name.endswith("prompter.bank")}
    assert len(frozen) == 2 * 3


def test_no_activation_is_shared():
    model = _model()
    assert len(list(model.parameters())) == len(
        list(model.named_parameters(remove_duplicate=False))
    )


# What it computes


@pytest.mark.parametrize("config", [MICRO, RESIDUAL], ids=["published", "residual"])
@pytest.mark.parametrize("factor", [1e-9, 3.0, 1e7])
def test_output_scales_with_the_input(config, factor):
    model, batch = _model(config), _batch()
    plain = model(**batch)
    scaled = model(**batch | {"kspace": factor * batch["kspace"]})
    torch.testing.assert_close(scaled.image / factor, plain.image)
    torch.testing.assert_close(scaled.kspace / factor, plain.kspace)
    torch.testing.assert_close(scaled.maps, plain.maps)


def test_image_is_the_rss_of_the_completed_kspace_and_maps_are_unit():
    result = _model()(**_batch(coils=4))
    torch.testing.assert_close(result.image, rss(ifft2c(result.kspace)))
    torch.testing.assert_close(rss(result.maps), torch.ones_like(result.image))


def test_zero_weight_keeps_the_measured_samples():
    model, batch = _model(), _batch()
    with torch.no_grad():
        model.cascades[-1].consistency_weight.zero_()
    kept = model(**batch).kspace * batch["mask"]
    torch.testing.assert_close(kept, batch["kspace"])


def test_residual_network_with_zero_last_layers_completes_by_sensitivities():
    """Without a correction each cascade is one projection step of SENSE."""
    model, batch = _model(RESIDUAL), _batch()
    with torch.no_grad():
        for module in (model.sensitivity, *model.cascades):
            for parameter in module.unet.tail.parameters():
                parameter.zero_()
        for cascade in model.cascades:
            cascade.consistency_weight.zero_()
    calibration = ifft2c(batch["kspace"] * batch["acs"])
    maps = calibration / rss(calibration)[:, None]
    estimate = batch["kspace"]
    for _ in model.cascades:
        combined = (maps.conj() * ifft2c(estimate)).sum(1, keepdim=True)
        estimate = torch.where(batch["mask"], batch["kspace"], fft2c(maps * combined))
    torch.testing.assert_close(model(**batch).kspace, estimate)


def test_each_item_of_a_mixed_batch_gets_its_own_text_and_mask():
    model, batch = _model(), _batch(batch=3)
    masks = batch["mask"].clone()
    masks[1, :, 1::2] = True
    batch["mask"] = masks
    together = model(**batch)
    for item in range(3):
        alone = model(**{name: value[item : item + 1] for name, value in batch.items()})
        _close(alone, [part[item : item + 1] for part in together])
    swapped = model(**batch | {"metadata_text": batch["metadata_text"].flip(0)})
    torch.testing.assert_close(swapped.image[1], together.image[1])
    assert not torch.allclose(swapped.image[0], together.image[0], rtol=1e-4)


@pytest.mark.parametrize("config", [MICRO, RESIDUAL], ids=["published", "residual"])
def test_coils_are_exchangeable_and_any_number_or_size_works(config):
    model = _model(config)
    for shape in ((1, 24, 20), (5, 17, 23), (2, 32, 9)):
        batch = _batch(1, *shape)
        order = torch.arange(shape[0]).flip(0)
        result, flipped = model(**batch), model(**batch | {"kspace": batch["kspace"][:, order]})
        assert result.image.shape == (1, *shape[1:])
        torch.testing.assert_close(flipped.image, result.image)
        torch.testing.assert_close(flipped.maps, result.maps[:, order])


def test_metadata_adapter_starts_as_the_identity():
    model, batch = _model(adapted=False), _batch()
    other = batch | {"metadata_text": batch["metadata_text"] + 1}
    _close(model(**batch), model(**other), rtol=0, atol=0)
    assert not torch.allclose(_model()(**batch).image, _model()(**other).image)


@pytest.mark.parametrize(
    ("variant", "metadata", "sampling"),
    [("SM", False, False), ("UT", False, True), ("MT", True, False), ("MM", True, True)],
)
def test_variants_depend_on_their_texts_only(variant, metadata, sampling):
    model, batch = _model(replace(MICRO, variant=variant)), _batch()
    plain = model(**batch).image
    for name, matters in (("metadata_text", metadata), ("sampling_text", sampling)):
        assert torch.equal(model(**batch | {name: batch[name] + 1}).image, plain) is not matters
        if matters:
            with pytest.raises(ModelError, match=f"{name} is absent.*{variant}"):
                model(**batch | {name: None})
        else:
            assert torch.equal(model(**batch | {name: None}).image, plain)


def test_projections():
    text = torch.randn(4, TEXT_WIDTH, dtype=torch.float64)
    head = _model().metadata_head
    torch.testing.assert_close(head(text).norm(dim=-1), torch.ones(4, dtype=torch.float64))
    legacy = _model(replace(MICRO, legacy_projection=True)).metadata_head
    torch.testing.assert_close(legacy(text), torch.sign(head.linear(text)))


def test_dead_coil_and_empty_scan_stay_finite():
    model = _model()
    for dead in ([1], [0, 1, 2]):
        batch = _batch()
        batch["kspace"][:, dead] = 0
        model.zero_grad()
        result = model(**batch)
        result.image.sum().backward()
        assert torch.isfinite(result.image).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert (result.image == 0).all()


# How it learns


def _gradients(model, batch):
    model.zero_grad()
    target = torch.linspace(0, 1, batch["kspace"].shape[-1])
    (model(**batch).image - target).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", [MICRO, RESIDUAL], ids=["published", "residual"])
def test_every_trainable_parameter_gets_a_gradient(config):
    gradients = _gradients(_model(config), _batch())
    silent = [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-12]
    assert not silent


def test_legacy_projection_stops_the_gradient_and_ours_does_not():
    ours, legacy = (
        _gradients(_model(replace(MICRO, legacy_projection=flag)), _batch())[
            "metadata_head.linear.weight"
        ]
        for flag in (False, True)
    )
    assert ours.abs().max() > 1e6 * legacy.abs().max()


def test_gradient_is_the_derivative():
    model, batch = _model(), _batch()
    target = torch.linspace(0, 1, batch["kspace"].shape[-1])
    for name in ("cascades.0.consistency_weight", "cascades.1.unet.decoder.0.adapter.scale"):
        parameter = model.get_parameter(name)
        gradient = _gradients(model, batch)[name].flatten()[0].item()
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.view(-1)[0] += step
                losses.append((model(**batch).image - target).square().mean().item())
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(gradient, rel=1e-5)


def test_recomputing_changes_nothing():
    batch = _batch()
    plain, saving = _model(), _model(recompute=True)
    _close(plain(**batch), saving(**batch), rtol=0, atol=0)
    expected, found = _gradients(plain, batch), _gradients(saving, batch)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-15)


def test_tiny_beats_zero_filling_after_a_few_steps():
    torch.manual_seed(0)
    model = CardioMM(replace(CONFIGS["tiny"], text_width=TEXT_WIDTH))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def image(seed):
        batch = _batch(1, 4, 48, 48, seed)
        batch["kspace"] = batch["kspace"].to(torch.complex64)
        return batch, rss(_coil_images(1, 4, 48, 48, seed)).float()

    def error(seed):
        batch, truth = image(seed)
        with torch.no_grad():
            ours = F.mse_loss(model(**batch).image, truth)
        return ours / F.mse_loss(rss(ifft2c(batch["kspace"])), truth)

    for step in range(60):
        batch, truth = image(step % 8)
        optimiser.zero_grad()
        (F.l1_loss(model(**batch).image, truth) / truth.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    # Well over 2 dB on images it has not seen.
    assert sum(error(seed) for seed in range(100, 104)) / 4 < 0.6


# What it refuses


@pytest.mark.parametrize("shape", [(TEXT_WIDTH,), (2, TEXT_WIDTH), (1, TEXT_WIDTH + 1)])
def test_text_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ModelError, match="metadata_text has shape"):
        _model()(**_batch() | {"metadata_text": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cascades": 0}, "cascades"),
        ({"variant": "XX"}, "variant"),
        ({"text_width": 0}, "text_width"),
    ],
)
def test_bad_configuration_is_refused(change, word):
    with pytest.raises(ConfigurationError, match=word):
        replace(MICRO, **change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"features": 0}, "features"),
        ({"widths": ()}, "widths"),
        ({"prompt_sizes": (4,)}, "prompt_sizes has 1 values"),
        ({"decoder_blocks": (1, -1)}, "decoder_blocks -1"),
        ({"bottleneck_blocks": -1}, "bottleneck_blocks"),
    ],
)
def test_bad_unet_is_refused(change, word):
    with pytest.raises(ConfigurationError, match=word):
        replace(_UNET, **change)
