"""A classifier with its model card: beside its weights in a folder, and in a repository of the Hugging Face hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.model_card import OURS, Facts, card, load_folder, load_hub, read_facts, write

if TYPE_CHECKING:
    from dfkd.teachers import Classifier

README = "README.md"


def push(classifier: "Classifier", repo_id: str, private: bool, token: str | None) -> str:
    """`Classifier.push_to_hub`; the repository is made before anything is sent."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            classifier.save_pretrained(folder)
            load = load_hub(repo.repo_id, classifier.architecture)
            replace_text(Path(folder) / README, card_of(classifier, load))
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Weights and model card")
    except Exception as error:  # of the network, the account, the name, or whatever the service answers
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        todo = "log in (hf auth login) with a token that may write, and give a name of the form OWNER/NAME"
        raise UsageError(f"{repo_id} could not be written on the hub", why, todo) from error
    return str(repo)


def save_card(classifier: "Classifier", folder: Path) -> None:
    """README.md in the folder, unless that has one which is no card of ours."""
    write(folder / README, card_of(classifier, load_folder(str(folder), classifier.architecture)))


def card_of(classifier: "Classifier", load: str) -> str:
    """The card of the folder that it was loaded from, else one made from what its run has on record there."""
    source = Path(classifier.source)
    source = source.parent if source.is_file() else source
    if not classifier.source or not source.is_dir():
        return card(Facts(classifier.config()), load)
    if (file := source / README).exists():
        text = file.read_text(encoding="utf-8")
        return re.sub(r"```python\n.*?```", lambda _: load, text, count=1, flags=re.DOTALL) if OURS in text else text
    return card(read_facts(source, classifier.config()), load)
