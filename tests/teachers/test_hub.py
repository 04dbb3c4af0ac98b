"""Handing over: a folder with its model card, and the same on the hub, for which HfApi has a stand-in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.teachers import Classifier, build

NAMES = ("zero", "one", "two")


@pytest.fixture
def student(tmp_path: Path) -> Classifier:
    """As it is loaded from the folder of a run."""
    torch.manual_seed(0)
    folder, half = tmp_path / "run/student/last", (0.5, 0.5, 0.5)
    Classifier(build("resnet8", 3).eval(), NAMES, half, half, 32, "resnet8").save_pretrained(folder)
    assert not (folder / "README.md").exists()  # a network in training has no card yet
    told = {"run": {"teacher": "resnet20 0123456789abcdef"}, "agreement": 0.9}
    (folder.parent / "result.json").write_text(json.dumps(told))
    return Classifier.from_pretrained(folder)


class Url(str):
    """Stands in for RepoUrl."""

    def __new__(cls, repo_id: str) -> "Url":
        url = super().__new__(cls, f"https://hub/{repo_id}")
        url.repo_id = repo_id
        return url


class Hub:
    """Stands in for HfApi."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.made, self.files = fault, dict[str, Any](), dict[str, bytes]()

    def __call__(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> Any:
        if self.fault:
            raise self.fault
        self.made = {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}
        return Url(repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.sent_to = repo_id
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    return found


def test_a_saved_folder_has_a_card_of_its_run(student: Classifier, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path / "handed")
    text = (tmp_path / "handed/README.md").read_text()
    assert "| teacher | resnet20 0123456789abcdef |" in text and f"load_student({str(tmp_path / 'handed')!r})" in text
    again = Classifier.from_pretrained(tmp_path / "handed")
    again.save_pretrained(tmp_path / "further")  # the run is far, its card is not
    further = (tmp_path / "further/README.md").read_text()
    assert further == text.replace("handed", "further")
    (tmp_path / "handed/README.md").write_text("mine")
    student.save_pretrained(tmp_path / "handed")
    assert (tmp_path / "handed/README.md").read_text() == "mine"


def test_what_is_on_the_hub_is_the_network_with_its_card(student: Classifier, hub: Hub, tmp_path: Path) -> None:
    assert student.push_to_hub("net", private=True, token="secret") == "https://hub/me/net"
    assert hub.made == {"repo_id": "net", "private": True, "exist_ok": True}
    assert (hub.sent_to, hub.token) == ("me/net", "secret")
    assert hub.files.keys() == {"model.safetensors", "config.json", "README.md"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert Classifier.from_pretrained(tmp_path).digest() == student.digest()
    card = hub.files["README.md"].decode()
    assert "resnet20 0123456789abcdef" in card and "snapshot_download('me/net')" in card and str(tmp_path) not in card
    assert len(re.findall(r"```python\n.*?```", card, re.DOTALL)) == 1


def test_a_network_of_ones_own_has_a_card_of_what_is_known(hub: Hub) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 3)).eval()
    Classifier(net, NAMES, (0.5,) * 3, (0.5,) * 3, 4).push_to_hub("me/own")
    card = hub.files["README.md"].decode()
    assert "zero, one, two" in card and 'architecture="file:YOUR.py:FUNCTION"' in card and "Not measured" in card


def test_a_card_of_ones_own_goes_along(student: Classifier, hub: Hub) -> None:
    Path(student.source, "README.md").write_text("mine")
    student.push_to_hub("me/net")
    assert hub.files["README.md"] == b"mine"


def test_a_hub_that_cannot_be_reached_is_named(student: Classifier, hub: Hub) -> None:
    hub.fault = ConnectionError("no route\nat all")
    with pytest.raises(UsageError, match=r"me/net could not be written on the hub: ConnectionError: no route\. log in"):
        student.push_to_hub("me/net")
