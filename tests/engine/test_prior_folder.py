"""A prior's files: malformed configs, damaged files, sets of weights side by side, and the hub. Each is named."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.opening import open_prior
from dfkd_engine.priors.prior import Prior, check_source
from dfkd_engine.priors.source import PriorSource
from tests.synthesis.small_sd import make_small_sd
from tests.tiny_priors import make_tiny_prior

UNET = "unet/diffusion_pytorch_model"
ODD = (None, "x", 2.5, 0, 7, True, [1], {})
# A part's config says one thing, another part's the other: no value is wrong by itself.
BETWEEN = ("weights have other shapes", "weights are not in its files", "weights are none of a", "unet takes ")
BETWEEN += (" is a ", "it wants inputs beside latents")
# What diffusers' own pipeline does not read: its names, and a shift that this pipeline leaves out.
TEXT = ((CLIPTokenizer, "tokenizer"), (CLIPTextModel, "text_encoder"))
UNREAD = ("_class_name", "_diffusers_version", "shift_factor")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small_sd(tmp_path_factory.mktemp("small") / "prior")


@pytest.fixture
def folder(small, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(small, tmp_path / "prior"))


def put(path, config):
    path.write_text(json.dumps(config))


def edit(path, **changes):
    put(path, json.loads(path.read_text()) | changes)


def refusal(folder, **options):
    """The refusal, by the check before any work or by loading; it has no line break."""
    with pytest.raises(EngineError) as caught:
        check_source(folder, **options)
        Prior.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equals_libraries(prior, folder):
    """The prior draws what diffusers' and transformers' own networks draw, used as StableDiffusionPipeline does."""
    tokenizer, text = (kind.from_pretrained(folder / name) for kind, name in TEXT)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokens = tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = prior.conditions(["a cat"], side=16)[0]
    z = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    with torch.no_grad():
        pairs = [(context, text(tokens)[0])]
        pairs += [(prior.denoise(z, 500, context), unet(z, 500, encoder_hidden_states=context).sample)]
        image = vae.decode(z / vae.config.scaling_factor).sample
        pairs += [(prior.decode(z), (image / 2 + 0.5).clamp(0, 1))]
    for ours, theirs in pairs:  # NHWC and NCHW: the same sums in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_any_value_of_any_key_loads_as_in_the_libraries_or_is_refused_by_name(folder, part):
    file = folder / part / "config.json"
    config, counts, compared = json.loads(file.read_text()), {"refused": 0, "loaded": 0}, set()
    for key, kept in config.items():
        for odd in ODD:
            if (type(odd), odd) == (type(kept), kept):
                continue
            put(file, config | {key: odd})
            try:
                prior = Prior.from_pretrained(folder)
            except EngineError as error:
                text = str(error)
                by_key = key in text and repr(odd) in text
                assert part in text.lower() and (by_key or any(words in text for words in BETWEEN)), (key, odd, text)
                counts["refused"] += 1
            else:
                counts["loaded"] += 1
                if key not in UNREAD and key not in compared:
                    equals_libraries(prior, folder)
                    compared.add(key)
    assert min(counts.values()) > 10


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("unet", {"block_out_channels": [8]}, r"block_out_channels is \[8\]: it has 1 levels, and .*_types has 2"),
        ("vae", {"block_out_channels": [4, 8, 8]}, r"block_out_channels is \[4, 8, 8\]: it has 3 levels"),
        ("unet", {"norm_num_groups": 3}, "norm_num_groups is 3: it does not divide 8 of block_out_channels"),
        ("unet", {"layers_per_block": 1.0}, "layers_per_block is 1.0: UNet2DConditionModel wants a whole number"),
        ("unet", {"layers_per_block": -1}, "layers_per_block is -1: UNet2DConditionModel wants more than 0"),
        ("unet", {"block_out_channels": []}, r"block_out_channels is \[\]: it has 0 levels"),
        ("unet", {"norm_eps": float("inf")}, "norm_eps is inf: UNet2DConditionModel wants finite numbers"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0: AutoencoderKL wants more than 0"),
        ("unet", {"act_fn": "silly"}, "act_fn is 'silly': with it no such network works"),
        ("unet", {"downsample_padding": 7}, "downsample_padding is 7: with it no such network works"),
        ("text_encoder", {"hidden_act": "gulu"}, "hidden_act is 'gulu': with it no such network works"),
        ("text_encoder", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ("text_encoder", {"architectures": "CLIPTextModel"}, "architectures is 'CLIPTextModel': it names"),
        ("text_encoder", {"vocab_size": 40}, "weights have other shapes than its config.json says, first embeddings"),
    ],
)
def test_the_key_and_its_value_are_named(folder, part, changes, message):
    edit(folder / part / "config.json", **changes)
    with pytest.raises(EngineError, match=f"{part}.*{message}"):
        Prior.from_pretrained(folder)


@pytest.mark.parametrize("part, key", [("unet", "layers_per_block"), ("vae", "scaling_factor")])
def test_a_typing_error_in_a_key_is_refused_and_other_unknown_keys_are_said(folder, part, key):
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    put(file, {name: value for name, value in config.items() if name != key} | {key + "s": config[key]})
    assert f"{key}s is {config[key]!r}: " in (text := refusal(folder)) and f"and {key} is missing" in text
    put(file, config | {"of_tomorrow": 3})
    with pytest.warns(UserWarning, match=f"{part}/config.json: .* does not know of_tomorrow = 3, and goes without"):
        check_source(folder)


def test_a_typing_error_in_a_text_encoders_key_is_refused(folder):
    file = folder / "text_encoder/config.json"
    config = json.loads(file.read_text())
    put(file, {name: v for name, v in config.items() if name != "hidden_act"} | {"hidden_actt": "gelu"})
    assert "text_encoder/config.json: hidden_actt is 'gelu'" in refusal(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
CONTENTS = {
    b"": "it is empty",
    POINTER: "it is a git-LFS pointer",
    b"<!doctype html>\n<html>Sign in</html>": "it is a web page",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "file",
    [
        f"{UNET}.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_what_a_download_left_instead_of_a_file(folder, file, content):
    (folder / file).write_bytes(content)
    text = refusal(folder)
    assert str(folder / file) in text and CONTENTS[content] in text
    with pytest.raises(EngineError):  # before any work, that is
        check_source(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_half_a_weight_file(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    whole = file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        text = refusal(folder)
        assert str(file) in text and "damaged, or only a part of it was fetched" in text


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"x"', "{", "[" * 100_000])
@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer/tokenizer_config.json", "model_index.json"])
def test_json_that_is_no_object(folder, file, content):
    (folder / file).write_text(content)
    assert f"{folder / file}: not JSON of an object" in refusal(folder)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77': it is a number of tokens"),
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token is 3: it is a text"),
        ("tokenizer.json", {"model": 3}, "tokenizer: could not be loaded"),
    ],
)
def test_a_tokenizers_files(folder, file, changes, message):
    edit(folder / "tokenizer" / file, **changes)
    assert message in refusal(folder)


def test_a_tokenizer_of_another_text_encoder(folder):
    file = folder / "tokenizer/tokenizer.json"
    text = file.read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    ids = {word: i + 1000 for word, i in vocabulary.items()}
    content = json.loads(text)
    content["model"]["vocab"] = ids
    for token in content["added_tokens"]:
        token["id"] += 1000
    put(file, content)
    assert "has token 10" in (error := refusal(folder)) and "text encoder's vocab_size is 88" in error


def variant(folder, name, keep=False, change=0.0):
    """Give every weight file the name of a variant, beside the plain one if that is to be kept."""
    for path in sorted(folder.glob("*/*.safetensors")):
        weights = {key: weight + change for key, weight in load_file(path).items()}
        save_file(weights, path.with_suffix(f".{name}.safetensors"), metadata={"format": "pt"})
        if not keep:
            path.unlink()


def bias(prior):
    return prior.denoiser.conv_out.bias[0].item()


def test_two_sets_of_weights_side_by_side_are_told_apart(folder):
    before = Prior.from_pretrained(folder)
    variant(folder, "fp16", keep=True, change=1e-3)
    plain, half = Prior.from_pretrained(folder), Prior.from_pretrained(folder, variant="fp16")
    assert plain.digests == before.digests and bias(plain) == bias(before)
    assert bias(half) == pytest.approx(bias(before) + 1e-3)
    changed = {part for part in half.digests if half.digests[part] != plain.digests[part]}
    assert changed == {"unet", "vae", "text_encoder"}
    for path in folder.glob("*/*[lr].safetensors"):  # the plain ones are not loaded, and not looked at
        path.write_bytes(b"")
    assert Prior.from_pretrained(folder, variant="fp16").digests == half.digests
    assert "no part has the variant 'bf16'; it has fp16" in refusal(folder, variant="bf16")


def test_the_only_set_is_taken_and_said(folder):
    before = Prior.from_pretrained(folder)
    variant(folder, "fp16")
    with pytest.warns(UserWarning, match="unet: its fp16 weights are taken, it has no plain ones"):
        assert bias(Prior.from_pretrained(folder)) == bias(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Prior.from_pretrained(folder, variant="fp16")
    for path in folder.glob("vae/*.safetensors"):
        path.rename(folder / "vae/diffusion_pytorch_model.safetensors")
    with pytest.warns(UserWarning, match="vae: its plain weights are taken, it has no fp16 ones"):
        Prior.from_pretrained(folder, variant="fp16")
    shutil.copy(folder / f"{UNET}.fp16.safetensors", folder / f"{UNET}.ema.safetensors")
    assert "unet/ has no plain diffusion_pytorch_model.safetensors, but the variants ema, fp16" in refusal(folder)


@pytest.mark.parametrize("part, network", [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)])
@pytest.mark.parametrize("name", [None, "fp16"])
def test_weights_in_several_files(folder, part, network, name):
    before = Prior.from_pretrained(folder)
    loaded = network.from_pretrained(folder / part)
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    loaded.save_pretrained(folder / part, variant=name, max_shard_size="20KB")
    found = PriorFolder.read(folder, name).weights(part)
    assert found[0].suffix == ".json" and len(found) > 2
    if name is None:
        prior = Prior.from_pretrained(folder)
        assert bias(prior) == bias(before) and prior.digests[part] != before.digests[part]
    else:
        with pytest.warns(UserWarning, match="vae: its plain weights are taken"):
            assert bias(Prior.from_pretrained(folder, variant=name)) == bias(before)
    found[1].unlink()
    assert f"{found[0]}: 1 of the {len(found) - 1} files that it names are missing" in refusal(folder, variant=name)
    put(found[0], {"weight_map": {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}})
    assert "is not a file beside it" in refusal(folder, variant=name)
    found[0].unlink()
    assert "index.json is missing, which says what is in" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_where_a_whole_file_and_an_index_lie_the_loaded_one_is_digested(folder, part):
    """diffusers takes the index, transformers the whole file."""
    network = UNet2DConditionModel if part == "unet" else CLIPTextModel
    other = network.from_pretrained(folder / part)
    for weight in other.parameters():
        weight.data += 1
    expected = next(other.parameters()).detach().clone()
    (whole,) = (folder / part).glob("*.safetensors")
    kept = whole.read_bytes()
    other.save_pretrained(folder / part, max_shard_size="20KB")
    whole.write_bytes(kept)
    weights = PriorFolder.read(folder).weights(part)
    assert (whole in weights) == (part == "text_encoder") and (len(weights) == 1) == (part == "text_encoder")
    loaded = next(Prior.from_pretrained(folder).networks[part].parameters())
    assert torch.equal(loaded, expected) == (part == "unet")


def test_weights_that_no_network_takes_are_refused(folder):
    for file, name in ((f"{UNET}.safetensors", "unet"), ("text_encoder/model.safetensors", "text_encoder")):
        weights = load_file(folder / file)
        save_file(weights | {"adapter.weight": torch.ones(2)}, folder / file, metadata={"format": "pt"})
        assert f"{name}: 1 weights are none of a" in (text := refusal(folder)) and "first adapter.weight" in text
        save_file(weights, folder / file, metadata={"format": "pt"})
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # of older versions of transformers
    save_file(load_file(folder / "text_encoder/model.safetensors") | ids, folder / "text_encoder/model.safetensors")
    Prior.from_pretrained(folder)


def test_pickled_weights_are_converted_by_the_command_that_is_named(folder):
    """The command is run as it is printed."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, safe_serialization=False)
    text = refusal(folder)
    assert "unet/ has its weights only in diffusion_pytorch_model.bin, a pickled file, which can run code" in text
    code = text.partition('python -c "')[2].partition('"')[0].replace("'NEW'", repr(str(folder) + "-new"))
    exec(code, {})
    assert bias(Prior.from_pretrained(f"{folder}-new")) == pipe.unet.conv_out.bias[0].item()


def test_a_size_that_the_config_does_not_state(folder):
    edit(folder / "unet/config.json", sample_size=None)
    prior = Prior.from_pretrained(folder)
    assert prior.latent_size is None and prior.conditions(["a"], side=16)[0].shape[0] == 1
    with pytest.raises(EngineError, match=r"its config states no size\. Say the side of the images"):
        prior.conditions(["a"])


def test_a_width_as_a_list(folder):
    edit(folder / "unet/config.json", cross_attention_dim=[32, 32])
    equals_libraries(Prior.from_pretrained(folder), folder)
    edit(folder / "unet/config.json", cross_attention_dim=[32, 64])
    assert "cross_attention_dim is [32, 64]" in refusal(folder)


class Hub:
    """The hub as huggingface_hub's functions show it: a folder for each id, a commit for all, and what was fetched."""

    def __init__(self, root: Path, repositories: dict[str, Path]) -> None:
        self.cache, self.repositories, self.online = root / "cache", repositories, True
        self.commit = "c0ffee"
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def snapshot_download(self, name, *, revision=None, allow_patterns, local_files_only=False):
        from huggingface_hub.utils import filter_repo_objects

        snapshot = self.cache / name.replace("/", "--") / self.commit
        if local_files_only or not self.online:
            names = self.list_repo_files(name) if name in self.repositories and self.online else []
            wanted = filter_repo_objects(names, allow_patterns=allow_patterns)
            if not snapshot.is_dir() or not all((snapshot / file).exists() for file in wanted):
                raise OSError("nothing in the cache, or not all")
            return str(snapshot)
        if name not in self.repositories:
            raise OSError("404 Client Error: Repository Not Found")
        self.revisions.append(revision)
        for file in filter_repo_objects(self.list_repo_files(name), allow_patterns=allow_patterns):
            if not (snapshot / file).exists():
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repositories[name] / file, snapshot / file)
                self.fetched.append(file)
        return str(snapshot)

    def list_repo_files(self, name, revision=None):
        if not self.online:
            raise OSError("no network")
        root = self.repositories[name]
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path, {})
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, *a, **k: found.list_repo_files(*a, **k))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return found


def weights(names):
    return {name for name in names if name.endswith((".safetensors", ".bin"))}


def clutter(folder):
    """What repositories hold beside a prior's parts."""
    variant(folder, "fp16", keep=True)
    for name in ("safety_checker", "image_encoder", "feature_extractor"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(b"x")
    for file in (f"{UNET}.bin", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md", "unet/model.onnx"):
        (folder / file).write_bytes(b"x")


def test_of_a_hub_id_the_loaded_files_are_fetched_and_no_others(hub, folder):
    clutter(folder)
    hub.repositories["owner/name"] = folder
    prior = Prior.from_pretrained("owner/name", revision="v1")
    assert hub.revisions == ["v1", hub.commit] and prior.source == "owner/name"
    plain = {f"{UNET}.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert weights(hub.fetched) == plain
    assert not {name.partition("/")[0] for name in hub.fetched} & {"safety_checker", "feature_extractor", "README.md"}
    assert prior.digests == Prior.from_pretrained(folder).digests  # wherever it lies
    Prior.from_pretrained("owner/name", variant="fp16")
    assert weights(hub.fetched) - plain == {name.replace(".safe", ".fp16.safe") for name in plain}
    assert "no part has the variant 'bf16'; it has fp16" in refusal("owner/name", variant="bf16")


@pytest.mark.parametrize("name", ["sdxl", "sd3-t5", "dit", "pixels-flat", "class-pixels"])
def test_every_family_is_fetched_whole(hub, tmp_path, name):
    hub.repositories["owner/name"] = made = make_tiny_prior(name, tmp_path / name)
    assert Prior.from_pretrained("owner/name").digests == Prior.from_pretrained(made).digests


def test_shards_of_a_hub_id(hub, folder):
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(folder / "shards", max_shard_size="20KB")
    (folder / f"{UNET}.safetensors").unlink()
    for path in (folder / "shards").glob("*.safetensors*"):
        path.rename(folder / "unet" / path.name)
    hub.repositories["owner/name"] = folder
    assert bias(Prior.from_pretrained("owner/name")) == bias(Prior.from_pretrained(folder))


def test_what_cannot_be_used_is_refused_before_weights_are_fetched(hub, folder):
    hub.repositories["owner/name"] = folder
    edit(folder / "unet/config.json", _class_name="UNet3DConditionModel")
    assert "unet is a UNet3DConditionModel" in refusal("owner/name") and not weights(hub.fetched)
    hub.commit = "beef"
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.bin")
    assert "prior owner/name: unet/ has its weights only in" in refusal("owner/name") and not weights(hub.fetched)


def test_offline(hub, folder, monkeypatch):
    hub.repositories["owner/name"] = folder
    absent = "it is not in the local cache, and nothing may be fetched (--offline, or HF_HUB_OFFLINE). Fetch it once"
    assert absent in refusal("owner/name", offline=True) and not hub.fetched
    assert "could not be fetched from the Hugging Face hub (404" in refusal("owner/other")
    online = Prior.from_pretrained("owner/name")
    hub.online = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert Prior.from_pretrained("owner/name", offline=True).digests == online.digests
    with pytest.warns(UserWarning, match=r"prior owner/name: the hub cannot be asked \(no network\)"):
        assert Prior.from_pretrained("owner/name").digests == online.digests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert absent in refusal("owner/other")
    (hub.cache / "owner--name" / hub.commit / f"{UNET}.safetensors").unlink()
    assert "unet/diffusion_pytorch_model.safetensors is missing" in refusal("owner/name")


def test_options_that_would_not_act_are_refused(folder, tmp_path):
    assert f"revision 'v1': {folder} is no hub id" in refusal(folder, revision="v1")
    assert f"prior config 'x': {folder} is no single file" in refusal(folder, config="x")
    with pytest.raises(EngineError, match="is no single file"):
        PriorSource("owner/name", config="x")
    assert isinstance(Prior.from_pretrained(folder, offline=True).denoiser, UNet2DConditionModel)


def test_a_network_that_is_not_of_the_prior_is_not_digested(tmp_path):
    made = make_tiny_prior("pixels", tmp_path / "pixels")
    before = Prior.from_pretrained(made)
    assert isinstance(before.denoiser, UNet2DModel) and before.digests.keys() == {"unet", "scheduler"}
    shutil.copytree(make_small_sd(tmp_path / "sd") / "text_encoder", made / "text_encoder")
    assert Prior.from_pretrained(made).digests == before.digests


def test_every_class_of_networks_that_priors_have_is_checked(tmp_path):
    """What their configs hold when diffusers writes them is known, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("sd1", "lcm", "sdxl", "sd3-t5", "dit", "pixels", "class-pixels"):
            check_source(make_tiny_prior(name, tmp_path / name))
        vae = diffusers.AutoencoderTiny(latent_channels=4)
        vae.save_pretrained(tmp_path / "sd1" / "vae")
        check_source(tmp_path / "sd1")


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"prompt": 3}, "dfkd.json: prompt is 3: it is a text"),
        ({"labels": ["a", 1]}, "dfkd.json: labels is ['a', 1]: they are a list of texts"),
        ({"label": ["a"]}, "dfkd.json: label is ['a']: a prior has no such key, and labels is missing"),
    ],
)
def test_what_a_prior_states_of_itself(folder, facts, message):
    put(folder / "dfkd.json", facts)
    assert message in refusal(folder)


@pytest.fixture(scope="module", params=[("sdxl", "unet"), ("dit", "transformer"), ("class-pixels", "unet")])
def family(request, tmp_path_factory):
    """A prior of another family and its denoiser's part."""
    name, part = request.param
    return make_tiny_prior(name, tmp_path_factory.mktemp("family") / name), part


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", [None, "x", 2.5, [1]])
def test_no_value_of_another_familys_config_leaves_a_traceback(family, odd):
    made, part = family
    file, refused = made / part / "config.json", 0
    whole = file.read_text()
    for key in json.loads(whole):
        edit(file, **{key: odd})
        try:
            Prior.from_pretrained(made)
        except EngineError as error:
            refused += part in str(error)
        file.write_text(whole)
    assert refused > 10


# Entries of published configs that differ from what their classes state, or that these do not know any more.
PUBLISHED = {
    "sdxl": ("unet", {"upcast_attention": None}),
    "sd3-t5": ("text_encoder_3", {"decoder_start_token_id": 0, "output_past": True, "torch_dtype": "float16"}),
    "sd1": ("text_encoder", {"dropout": 0.0, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0"}),
    "dit": (
        "transformer",
        {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_configs_hold_is_taken_without_a_word(tmp_path, name):
    made, (part, entries) = make_tiny_prior(name, tmp_path / name), PUBLISHED[name]
    before = Prior.from_pretrained(made)
    edit(made / part / "config.json", **entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = Prior.from_pretrained(made)
    assert found.family.name == before.family.name and found.digests[part] != before.digests[part]


def test_an_adapter_beside_the_weights_is_refused(folder):
    put(folder / "text_encoder/adapter_config.json", {"peft_type": "LORA"})
    assert "text_encoder/adapter_config.json lies beside its weights, and would change them" in refusal(folder)


def test_what_is_no_fault_of_the_config_is_not_put_down_to_it(folder, monkeypatch):
    def short(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", short)
    assert "unet/config.json: the network could not be loaded or called (RuntimeError: DefaultCPU" in refusal(folder)


def test_a_vae_that_lies_alone(hub, folder):
    """As stabilityai/sd-vae-ft-mse does: a VAE to take, and no prior."""
    hub.repositories["owner/vae"] = folder / "vae"
    found = open_prior("owner/vae")
    assert found.networks == ("vae",) and found.configs["scheduler"] == {}
    found.require("vae")
    ours, theirs = found.load(AutoencoderKL, "vae"), AutoencoderKL.from_pretrained(folder / "vae")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert "unet/config.json or transformer/config.json is missing" in refusal(folder / "vae")


def test_offline_what_nobody_needs_may_be_missing(hub, folder):
    hub.repositories["owner/name"] = folder
    before = Prior.from_pretrained("owner/name")
    put(folder / "unet/diffusion_pytorch_model.safetensors.index.ema.json", {})  # which the cache does not have
    assert Prior.from_pretrained("owner/name", offline=True).digests == before.digests


def test_a_tokenizer_of_vocabulary_and_merges(folder):
    before = Prior.from_pretrained(folder).conditions(["an ofpho"])[0]
    (folder / "tokenizer/tokenizer.json").unlink()
    assert torch.equal(Prior.from_pretrained(folder).conditions(["an ofpho"])[0], before)
    (folder / "tokenizer/vocab.json").write_text('{"a": "x"}')
    assert f"{folder / 'tokenizer'}: could not be loaded" in refusal(folder)
    (folder / "tokenizer/merges.txt").unlink()
    assert "tokenizer/ has neither tokenizer.json nor vocab.json with merges.txt" in refusal(folder)
