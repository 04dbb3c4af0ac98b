import pytest
import torch

from dfkd.training.held_out import confusion_matrix, score, split


def test_the_split_is_by_id_and_of_the_fraction_asked() -> None:
    ids = torch.arange(1000)
    train, held = split(ids, 0.05)
    assert len(held) == 50
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(1000))
    shuffled = ids[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert set(shuffled[split(shuffled, 0.05)[1]].tolist()) == set(held.tolist())
    # An image held out of many is held out of any part of them as well, as long as its neighbours in rank are.
    assert set(split(ids, 0.02)[1].tolist()) < set(held.tolist())


@pytest.mark.parametrize(("count", "part", "wanted"), [(100, 0.0, 0), (3, 0.05, 1), (2, 0.5, 1)])
def test_small_sets_keep_one_image_on_each_side(count: int, part: float, wanted: int) -> None:
    train, held = split(torch.arange(count), part)
    assert len(held) == wanted and len(train) == count - wanted


def test_score_orders_by_agreement_and_then_by_loss() -> None:
    teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    right, sure, wrong = teacher / 2, teacher, -teacher
    assert score(sure, teacher, 4.0) > score(right, teacher, 4.0) > score(wrong, teacher, 4.0)
    assert score(right, teacher, 4.0)[0] == 1 and score(wrong, teacher, 4.0)[0] == 0


def test_confusion_counts_truth_by_row() -> None:
    matrix = confusion_matrix(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 2, 1]), 3)
    assert matrix == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
