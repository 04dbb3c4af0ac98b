"""Classes by name: which id a name means, and which names mean none or several."""

import pytest

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.families.class_names import ClassNames
from dfkd_engine.priors.folder import PriorFolder

IMAGENET = {  # entries of the published id2label, some of the odd ones
    2: "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
    134: "crane",
    264: "Cardigan, Cardigan Welsh corgi",
    474: "cardigan",
    517: "crane",
    638: "maillot",
    639: "maillot, tank suit",
    657: "missile",
    744: "projectile, missile",
    1: "ice_bear, polar bear",
}


@pytest.mark.parametrize(
    "name, number",
    [
        ("white shark", 2),  # a synonym
        (IMAGENET[2], 2),  # the whole entry
        ("Great_White_Shark", 2),  # case and underscores do not count
        ("  white   shark ", 2),
        ("Cardigan", 264),  # unless they tell classes apart
        ("cardigan", 474),
        ("CARDIGAN", 474),  # its whole entry
        ("maillot", 638),  # a whole entry goes before a synonym
        ("tank suit", 639),
        ("missile", 657),
        ("MISSILE", 657),
        ("ice bear", 1),
        ("crane 134", 134),  # as a teacher's classes of one name are told apart
        ("Crane 517", 517),
    ],
)
def test_a_name_means_one_id(name, number):
    assert ClassNames(IMAGENET, "dit").id_of(name) == number


@pytest.mark.parametrize(
    "name, message",
    [
        ("crane", r"class 'crane': it names the ids 134 \(crane\), 517 \(crane\)"),
        ("crane", "Write the id behind it, such as crane 134"),
        ("crane 135", "no class 'crane 135'"),
        ("tank", "no class 'tank': it knows 10 classes, such as .*tank suit"),
        ("tank", r"name them in dfkd\.json as the teacher does, or draw others with --only"),
        ("", "no class ''"),
        ("a photo of a crane", "the prompt is the class's name"),
    ],
)
def test_a_name_that_means_none_or_several(name, message):
    with pytest.raises(EngineError, match=message):
        ClassNames(IMAGENET, "dit").id_of(name)


def folder(tmp_path, **configs):
    return PriorFolder(tmp_path, {"model_index": {}, "dfkd": {}} | configs)


def test_where_the_names_stand(tmp_path):
    index = {"id2label": {"0": "a", "1": "b"}}
    assert ClassNames.of(folder(tmp_path, model_index=index), 2).facts() == {"classes": ["a", "b"]}
    own = {"labels": ["c", "d"]}
    assert ClassNames.of(folder(tmp_path, model_index=index, dfkd=own), 2).facts() == {"classes": ["c", "d"]}


@pytest.mark.parametrize(
    "configs, message",
    [
        ({}, "takes 3 class ids, and 3 of them have no name, first 0"),
        ({"model_index": {"id2label": {"0": "a", "2": "c"}}}, "1 of them have no name, first 1"),
        ({"dfkd": {"labels": ["a", "b"]}}, "1 of them have no name, first 2"),
        ({"dfkd": {"labels": ["none", "a", "b", "c"]}}, r"takes 3 class ids, and 4 are named, 3 \(c\) among them"),
        ({"model_index": {"id2label": {"zero": "a"}}}, "id2label: it is no table of class ids"),
        ({"model_index": {"id2label": ["a", "b", "c"]}}, "id2label: it is no table of class ids"),
        ({"model_index": {"id2label": None}}, "id2label: it is no table of class ids"),
    ],
)
def test_names_that_are_missing_or_malformed(tmp_path, configs, message):
    with pytest.raises(EngineError, match=message):
        ClassNames.of(folder(tmp_path, **configs), 3)
