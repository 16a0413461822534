"""What --model may name, and every way in which it may be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from stages.errors import CheckpointError, ModelError
from stages.models.candidates import POLICIES
from stages.models.model_ref import open_model, same_base
from tests.parts import publish_checkpoint, random_adapter, random_head
from tests.tiny import build_tokenizer


def open_ref(name, stages=("sft", "ppo")):
    return open_model(str(name), stages=stages, what="--model")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A base of one's own to spoil."""
    return shutil.copytree(model_folder("llama"), tmp_path / "base")


@pytest.fixture
def checkpoint(folder, open_tiny, tmp_path):
    """An SFT checkpoint on that base."""
    base = open_tiny("llama")
    base.ref = open_ref(folder)
    return publish_checkpoint(tmp_path / "runs" / "sft", base, "sft", random_adapter(base, 1))


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))


def change_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(name, stages=("sft", "ppo")):
    with pytest.raises((ModelError, CheckpointError)) as caught:
        open_ref(name, stages)
    assert caught.value.fix
    return caught.value


# --- what is accepted


def test_a_base_folder(folder, monkeypatch):
    source = open_ref(folder)
    assert source.manifest is None and source.folder is None
    assert (source.base, source.tokenizer, source.base_name) == (folder, folder, str(folder))
    assert source.config["model_type"] == "llama" and source.context == 128
    assert source.digest == f"{source.base_digest}:{source.tokenizer_digest}"
    monkeypatch.chdir(folder.parent)
    relative = open_ref("base")
    assert relative.base_name == str(folder) and relative.base_digest == source.base_digest
    assert relative.base_ref.path == str(folder)


def test_a_checkpoint_brings_its_base(folder, checkpoint):
    source = open_ref(checkpoint)
    assert source.manifest.stage == "sft" and source.folder == checkpoint
    assert source.base == folder and source.tokenizer == folder  # it holds no tokenizer of its own
    assert source.base_digest == open_ref(folder).base_digest
    build_tokenizer(checkpoint)
    assert open_ref(checkpoint).tokenizer == checkpoint


def test_a_checkpoint_moved_together_with_its_base_is_found(folder, checkpoint, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("base", "runs"):
        shutil.move(tmp_path / name, elsewhere / name)
    assert open_ref(elsewhere / "runs" / "sft").base == elsewhere / "base"


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 1024, "max_position_embeddings": None}, 1024),
        ({"n_positions": 1024, "n_ctx": 512, "max_position_embeddings": None}, 512),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"max_position_embeddings": None}, 2**30),
        ({"max_position_embeddings": -1}, 2**30),
    ],
)
def test_the_context_is_what_the_config_says(folder, config, context):
    change_config(folder, **config)
    assert open_ref(folder).context == context


def test_a_hub_id_is_fetched_without_anything_that_could_run(folder, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_ref("some-org/some.model")
    assert asked["name"] == "some-org/some.model"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["patterns"])
    assert source.base_name == "some-org/some.model"
    assert source.base_ref.name == "some-org/some.model" and source.base_ref.path is None


# --- what is refused


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-folder-here", "no-such-model", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    error = refused(name)
    assert error.what == f"{name} does not exist" and error.where == "--model"


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def download(name, allow_patterns):
        raise OSError("cannot reach the hub\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    error = refused("some-org/some-model")
    assert error.what == ("some-org/some-model is no local folder, and the hub did not give it: cannot reach the hub")


def test_a_file(folder):
    assert "config.json is a file" in refused(folder / "config.json").what


def test_a_folder_without_a_model(tmp_path):
    assert "holds no config.json" in refused(tmp_path).what


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "config.json cannot be read"), ("[]", "config.json cannot be read"), ("{}", "names no model_type")],
)
def test_a_config_that_says_nothing(folder, text, said):
    (folder / "config.json").write_text(text)
    assert said in refused(folder).what


def test_an_encoder_decoder(folder):
    change_config(folder, is_encoder_decoder=True, model_type="t5")
    assert "is an encoder-decoder (t5)" in refused(folder).what


def test_code_of_its_own_is_refused_unless_trusted(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    error = refused(folder)
    assert "auto_map" in error.what and "--trust-remote-code" in error.fix
    trusted = open_model(str(folder), stages=(), what="--model", trust_remote_code=True)
    assert trusted.base == folder


def test_a_model_without_a_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    assert refused(folder).what == f"{folder} has no tokenizer"


def test_a_model_without_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled" in refused(folder).what


def test_an_unfinished_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    error = refused(tmp_path)
    assert "is an unfinished run" in error.what and "again to finish it" in error.fix


def test_an_empty_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json cannot be read: it has no 'r'" in refused(tmp_path, POLICIES).what
    assert "is a LoRA adapter of another tool" in refused(tmp_path, ("reward",)).what


def test_a_checkpoint_of_the_wrong_stage(checkpoint):
    error = refused(checkpoint, stages=("reward",))
    assert error.what == f"{checkpoint} is a `sft` checkpoint" and "reward" in error.fix


def test_a_checkpoint_whose_base_was_changed(folder, checkpoint):
    change_weights(folder)
    assert "is not the one that" in refused(checkpoint).what


def test_a_checkpoint_whose_base_is_gone(folder, checkpoint):
    shutil.rmtree(folder)
    error = refused(checkpoint)
    assert str(folder) in error.what


def test_a_checkpoint_with_a_damaged_file(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "`adapter_model.safetensors` is damaged" in refused(checkpoint).what


# --- two that must share a base


def test_checkpoints_of_one_base_fit_together(checkpoint, folder):
    same_base(open_ref(checkpoint), open_ref(folder), first_flag="--model", second_flag="--reward")


def test_checkpoints_of_two_bases_do_not(checkpoint, model_folder):
    other = open_ref(model_folder("gpt2"))
    with pytest.raises(CheckpointError, match="cannot share one frozen base") as caught:
        same_base(open_ref(checkpoint), other, first_flag="--model", second_flag="--reward")
    assert caught.value.where == "--model, --reward" and f"--model {checkpoint}" in caught.value.fix


def test_two_tokenizers_do_not_fit_together(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = 300
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="have different tokenizers"):
        same_base(open_ref(folder), open_ref(other), first_flag="--model", second_flag="--against")


def test_a_reward_checkpoint_on_a_base_is_known_by_its_stage(folder, open_tiny, tmp_path):
    base = open_tiny("llama")
    reward = publish_checkpoint(
        tmp_path / "reward", base, "reward", random_adapter(base, 1), head=random_head(base.width, 2)
    )
    assert open_ref(reward, stages=("reward",)).manifest.stage == "reward"
    assert "is a `reward` checkpoint" in refused(reward).what
