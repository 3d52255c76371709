"""Notebook 16 on tiny random folders in the formats of Llasa and Orpheus, tokenizer included."""

import json

import pytest
import tiny_speech_folders
import torch
from notebook_code import run_notebook
from transformers import AutoModelForCausalLM

from ssd_repro import cli
from ssd_repro.errors import InputError


@pytest.fixture(scope="module", params=["llasa", "orpheus"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_speech_folders.save(path / "model", request.param)
    return path


def run(folder, **other):
    return run_notebook(
        "16_your_model", model=str(folder / "model"), out=str(folder / "out"), max_new_tokens=60, **other
    )


def test_end_to_end(folder):
    space = run(folder, text="Good day.", precision="fp32")
    kind, tokenizer, prompt = space["prompt_of"].__name__, space["tokenizer"], space["prompt"][0].tolist()
    assert kind == folder.name.rstrip("0123456789") and len(space["code_of"]) == 40
    shown = tokenizer.decode(prompt)
    assert "Good day." in shown
    ends = {"llasa": "<|SPEECH_GENERATION_START|>", "orpheus": "<|eot_id|><custom_token_4>"}
    assert shown.endswith(ends[kind]) and prompt.count(tokenizer.bos_token_id) == 1
    about = json.loads((folder / "out" / "16_your_model.json").read_text())
    assert list(about["codes"]) == ["transformers' generate", "SSD, beta 0", "SSD, beta 0.4"]
    assert all(codes and set(codes) <= set(range(40)) for codes in about["codes"].values())
    plain, lossless, tolerant = about["rows"]
    assert 0 <= lossless["acceptance"] <= tolerant["acceptance"] <= 1 and "acceptance" not in plain
    assert tolerant["tokens per target call"] > 1


def test_draft_trained_for_it(folder):
    """Rows by the notebook's own prompt, a draft by the command, and the notebook with both."""
    space = run(folder, text="Good day.")
    speech = list(space["code_of"])[:12]
    stop = space["sampling"]["eos_token_id"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.update(eos_token_id=stop, do_sample=True, temperature=0.8, max_new_tokens=30)
    model.generation_config.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"id": f"u{i}", "text_ids": space["prompt"][0].tolist(), "speech": speech[i:]}) + "\n"
            for i in range(8)
        )
    )
    command = ["train-draft", "--target", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--out"]
    command += [str(folder / "draft"), "--steps", "3", "--batch", "4", "--held-out", "2", "--device", "cpu"]
    assert cli.main([*command, "--recipe", "on-policy"]) == 0
    space = run(folder, draft=str(folder / "draft"), tolerances=[0.4])
    embedding = space["lm"].get_input_embeddings().weight
    assert space["small"].get_input_embeddings().weight is embedding and embedding.dtype == torch.bfloat16
    assert len(space["table"]) == 2


def test_bad_folders_say_so(folder, tmp_path):
    with pytest.raises(InputError, match="-p model FOLDER"):
        run_notebook("16_your_model")
    with pytest.raises(InputError, match="precision is 'fp8'"):
        run(folder, precision="fp8")
    other = tiny_speech_folders.tokenizer(["<extra>"])
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="neither format"):
        run(tmp_path)


def test_by_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny_speech_folders.save(tmp_path / "model", "llasa")
    given = ["-p", "model", "model", "-p", "max_new_tokens", "9"]
    assert cli.main(["run", "--only", "16", "--out", "out", *given]) == 0
    assert (tmp_path / "out" / "16_your_model.ipynb").is_file() and (tmp_path / "out" / "16_your_model.json").is_file()
