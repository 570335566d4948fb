"""Log-mel spectrograms against SciPy, and against what a sine must give."""

from __future__ import annotations

import numpy as np
import scipy.signal

from robovlms_jax.inputs import audio

RATE, WINDOW, HOP, MELS = 16_000, 400, 160, 40


def test_a_spectrogram_is_scipys_in_mel_bands():
    pcm = np.random.default_rng(0).uniform(-1, 1, (2, 1_600)).astype(np.float32)
    found = audio.log_mel(pcm, sample_rate=RATE, window=WINDOW, hop=HOP, num_mels=MELS)
    taper = scipy.signal.get_window("hann", WINDOW)  # periodic
    starts = np.arange(0, 1_600 - WINDOW + 1, HOP)
    power = np.stack(
        [scipy.signal.periodogram(pcm[:, s : s + WINDOW], window=taper, nfft=512, detrend=False)[1] for s in starts], 1
    )
    power[..., 1:-1] /= 2  # SciPy folds negative frequencies onto the positive ones
    power *= (taper**2).sum()  # and divides by the window's energy
    expected = np.log10(np.maximum(power @ audio.mel_filters(RATE, 512, MELS), audio.FLOOR))
    assert found.shape == (2, len(starts), MELS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_sine_is_loudest_in_the_band_around_its_pitch_with_the_windows_power():
    # |DFT| of a sine of amplitude a at a bin's centre is a / 2 times the sum of the window.
    pitch = 32 * RATE / 512
    pcm = 0.5 * np.sin(2 * np.pi * pitch * np.arange(WINDOW) / RATE)
    bands = np.asarray(audio.log_mel(pcm, sample_rate=RATE, window=WINDOW, hop=HOP, num_mels=MELS))[0]
    filters = audio.mel_filters(RATE, 512, MELS)
    assert bands.argmax() in np.argsort(filters[32])[-2:]
    peak = (0.5 / 2 * 200) ** 2
    assert peak < 10 ** bands.max() < 4 * peak  # the band also takes the main lobe's neighbours
    silence = audio.log_mel(np.zeros(WINDOW), sample_rate=RATE, window=WINDOW, hop=HOP, num_mels=MELS)
    np.testing.assert_allclose(silence, np.full((1, MELS), np.log10(audio.FLOOR)), rtol=1e-6)


def test_mel_bands_are_triangles_between_their_neighbours_middles():
    filters = audio.mel_filters(RATE, 512, MELS)
    hertz = np.arange(257) * RATE / 512
    middles = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), MELS + 2) / 2595) - 1)
    for band in range(MELS):
        inside = (hertz > middles[band]) & (hertz < middles[band + 2])
        assert (filters[inside, band] > 0).all() and (filters[~inside, band] == 0).all()
