import numpy as np
import pytest
import torch

from ssd_repro.models.codec import FEATURES, SAMPLE_RATE, Codec, CodecConfig, analyse, synthesise


@pytest.fixture(scope="module")
def tone():
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 150 * t) + 0.1 * np.sin(2 * np.pi * 450 * t)).astype(np.float32)


def test_world_keeps_pitch_and_length(tone):
    features = analyse(tone)
    assert features.shape == (201, FEATURES)
    again = synthesise(features[:200])
    assert len(again) == SAMPLE_RATE  # 5 ms a frame
    spectrum = np.abs(np.fft.rfft(again[4800:19200]))
    peak = np.fft.rfftfreq(14400, 1 / SAMPLE_RATE)[spectrum.argmax()]
    assert abs(peak - 150) < 5


def test_codes_and_digits_are_inverse_over_the_whole_codebook():
    codec = Codec(CodecConfig(encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=1))
    every = torch.arange(codec.config.codebook_size)
    digits = codec.to_digits(every)
    assert set(digits.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(codec.to_code(digits), every)
    assert len(digits.unique(dim=0)) == 6561


def test_quantise_rounds_and_passes_the_gradient():
    codec = Codec(CodecConfig(encoder_width=8, decoder_width=8))
    x = torch.tensor([0.2, 0.8, -0.7], requires_grad=True)
    codec.quantise(x).sum().backward()
    assert codec.quantise(x).tolist() == [0.0, 1.0, -1.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_decode_is_960_samples_a_code_and_refuses_what_is_no_code():
    codec = Codec(CodecConfig(encoder_width=8, decoder_width=8)).eval()
    assert len(codec.decode(torch.tensor([0, 5, 6560]), 0)) == 3 * 960
    with pytest.raises(ValueError, match="0..6560"):
        codec.decode(torch.tensor([6561]), 0)
    with pytest.raises(ValueError, match="at least one"):
        codec.decode(torch.tensor([], dtype=torch.long), 0)
