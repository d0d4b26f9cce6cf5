import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import input as program


@pytest.mark.long
def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(program, "FEATURES", (2, 3, 4))
    sets = ("digits", "no_such_set")
    program.run(program.Config(datasets=sets, batch=4, images=2, rounds=1))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}
    assert {"digits", "step", "shift, flip", "decoding alone"} < set(cells)
    assert "no_such_set" not in cells
    assert float(cells["step"]) > 0
    assert float(cells["and a random part, 224 x 224"].replace(",", "")) > 0


def test_the_images_have_the_spectrum_of_photographs():
    """An amplitude of 1/f in the plane: along a row, power of 1/f; of white noise 1."""
    pixels = np.asarray(Image.open(io.BytesIO(program.jpeg(3))))
    assert pixels.shape == (400, 500, 3)
    power = abs(np.fft.fft(pixels[..., 1].astype(float), axis=1)) ** 2
    low, high = power[:, 8:16].mean(), power[:, 32:64].mean()
    assert 3 < low / high < 12
