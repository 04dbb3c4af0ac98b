"""The preview of a run: the newest images of its classes, small."""

import numpy as np
import pytest
import torch

from dfkd.data.contact_sheet import PREVIEW_COLUMNS, PREVIEW_ROWS, SMALL, preview


def test_the_newest_images_of_a_class_come_first() -> None:
    images = torch.arange(0, 200, 10, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    picture = np.asarray(preview(images, torch.arange(20) % 2, ("even", "odd")))
    for offset, row in ((180, 0), (190, 1)):
        levels = [offset - 20 * place for place in range(PREVIEW_COLUMNS)]
        middle = 12 + row * 72 + 32  # a margin, then tiles of 8 pixels enlarged by 8, with gaps
        line = picture[middle, :, 0].tolist()
        first = line.index(levels[0])
        assert [line[first + 72 * place] for place in range(PREVIEW_COLUMNS)] == levels


@pytest.mark.parametrize(("size", "classes"), [(2, 3), (65, 3), (512, 40), (511, 1)])
def test_it_stays_small(size: int, classes: int) -> None:
    images = torch.zeros(80, 3, size, size, dtype=torch.uint8)
    picture = preview(images, torch.arange(80) % classes, [f"class {i}" for i in range(classes)])
    assert picture.width < (PREVIEW_COLUMNS + 3) * 2 * SMALL and picture.height <= PREVIEW_ROWS * 2 * SMALL
