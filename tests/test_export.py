"""A GGUF's tokenizer written as files means the same: to our loader, to transformers, and after `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist import __main__
from llama_dist.checkpoint.gguf_header import read_metadata
from llama_dist.checkpoint.hf_writer import hf_config
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.config import RunConfig
from llama_dist.engine.session import read_tokenizer
from llama_dist.errors import CheckpointError
from llama_dist.text.chat import Message, encode_dialog
from llama_dist.text.export import tokenizer_files
from llama_dist.text.load import load_tokenizer, tokenizer_from_gguf
from llama_dist.text.pretokenizers import PRE_TOKENIZERS
from llama_dist.text.tokenizer import PieceTokenizer
from tests import tiny, tiny_tokenizer
from tests.assets import mistral_tokenizer, smollm2_gguf
from tests.conftest import Saver
from tests.text_kinds import AWKWARD, BLANKS, mistral_metadata, smollm2_metadata, tricky_text

DIALOG: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " caf\u00e9 \u4f60\u597d\n\n\t3.14 "},
    {"role": "assistant", "content": "  two  spaces"},
    {"role": "user", "content": "why?"},
]
FIELDS = ("bos_id", "eos_id", "stop_ids", "add_bos", "chat_template", "spaced", "each_byte")
LIBRARY_TEXTS = AWKWARD[:-1]  # the last spells control tokens, which transformers reads in any text


def export(metadata: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in tokenizer_files(metadata).items():
        (folder / name).write_bytes(data)
    return folder


def encode(tokenizer: PieceTokenizer, s: str) -> list[int]:
    return tokenizer.encode(s, bos=tokenizer.add_bos, eos=False)


def same(one: PieceTokenizer, other: PieceTokenizer) -> None:
    for s in AWKWARD:
        ids = encode(one, s)
        assert encode(other, s) == ids
        assert other.decode(ids) == one.decode(ids)
    for field in FIELDS:
        assert getattr(one, field) == getattr(other, field), field
    assert other.special == one.special
    known = other.n_words
    assert list(one.pieces[:known]) == list(other.pieces) and not any(one.pieces[known:])


def in_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def chat_ids(theirs: Any) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False)
    return ids


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's files of the real GGUF, with the config.json that `convert` writes."""
    folder = export(smollm2_metadata(), tmp_path_factory.mktemp("smollm2"))
    reader = open_checkpoint(smollm2_gguf())
    reader.close()
    (folder / "config.json").write_text(json.dumps(hf_config(reader.config, next(iter(reader.tensors.values())).dtype)))
    return folder


def test_smollm2_comes_back(smollm2_folder: Path) -> None:
    ours, back = tokenizer_from_gguf(smollm2_metadata()), load_tokenizer(smollm2_folder)
    same(ours, back)
    assert (back.kind, back.n_words, back.pad_id) == ("tokenizer.json", ours.n_words, ours.pad_id)
    assert encode_dialog(back, DIALOG, "template") == encode_dialog(ours, DIALOG, "template")


def test_smollm2_is_the_same_to_transformers(smollm2_folder: Path) -> None:
    ours, theirs = tokenizer_from_gguf(smollm2_metadata()), in_transformers(smollm2_folder)
    for s in LIBRARY_TEXTS:
        assert theirs.encode(s) == encode(ours, s)
        assert theirs.decode(encode(ours, s)) == ours.decode(encode(ours, s))
    for text, i in ours.special.items():
        assert theirs.encode(f"a{text} b") == [*encode(ours, "a"), i, *encode(ours, " b")]
        assert theirs.decode([i], skip_special_tokens=True) == ""
    assert chat_ids(theirs) == encode_dialog(ours, DIALOG, "template")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def made_metadata(pre: str) -> dict[str, Any]:
    """The tiny vocabulary with a tag, a word, blanks, and an unused token that a whole-word look-up would find."""
    tokens = [*tiny_tokenizer.words(), "<think>", "tool", BLANKS, "thing", "<|end|>", "[PAD0]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (tiny_tokenizer.N_WORDS - 5) + [4, 4, 4, 5, 4, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tiny_tokenizer.MERGES],
        "tokenizer.ggml.bos_token_id": tiny_tokenizer.BOS,
        "tokenizer.ggml.eos_token_id": tiny_tokenizer.EOS,
        "tokenizer.chat_template": "{{ bos_token }}<think>" + tiny_tokenizer.CHAT_TEMPLATE,
    }


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer(tmp_path: Path, pre: str) -> None:
    metadata = made_metadata(pre)
    ours, back = tokenizer_from_gguf(metadata), load_tokenizer(export(metadata, tmp_path))
    same(ours, back)
    theirs = in_transformers(tmp_path)
    texts = [*LIBRARY_TEXTS, "a thing, thing tool" + BLANKS + "[PAD0] the yours 12345 WE'LL\n\n x //\n"]
    for s in texts:
        assert theirs.encode(s) == encode(ours, s) == encode(back, s)
    assert ours.add_bos == PRE_TOKENIZERS[pre].add_bos == (theirs.encode("a")[0] == tiny_tokenizer.BOS)
    assert chat_ids(theirs) == encode_dialog(ours, DIALOG, "template") == encode_dialog(back, DIALOG, "template")
    assert theirs.encode("<think>", add_special_tokens=False) == [ours.special["<think>"]]
    # A tag is shown, and a token that ends answers hidden, to both.
    assert theirs.decode([tiny_tokenizer.N_WORDS, tiny_tokenizer.EOS], skip_special_tokens=True) == "<think>"


@settings(max_examples=80)
@given(st.data(), st.sampled_from(["smollm", "qwen2", "llama-bpe", "tekken"]))
def test_any_text_gives_the_same_ids(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, pre: str) -> None:
    folder = tmp_path_factory.getbasetemp() / f"any-{pre}"
    if not folder.exists():
        export(made_metadata(pre), folder)
    ours = tokenizer_from_gguf(made_metadata(pre))
    s = data.draw(tricky_text(ours))
    assert encode(load_tokenizer(folder), s) == encode(ours, s)


def test_sentencepiece_comes_back(tmp_path: Path) -> None:
    import sentencepiece

    template = "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}{{ eos_token }}"
    metadata = mistral_metadata() | {"tokenizer.chat_template": template}
    ours, back = tokenizer_from_gguf(metadata), load_tokenizer(export(metadata, tmp_path))
    same(ours, back)
    assert (back.kind, back.n_words) == ("sentencepiece", ours.n_words)
    for chat_format in ("template", "mistral"):
        assert encode_dialog(back, DIALOG, chat_format) == encode_dialog(ours, DIALOG, chat_format)
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer()))
    for s in AWKWARD:
        assert written.encode(s, add_bos=True, add_eos=True) == original.encode(s, add_bos=True, add_eos=True)
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(written, name)() == getattr(original, name)()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_flags_of_sentencepiece_come_along(tmp_path: Path, add_bos: bool, prefix: bool) -> None:
    """Other names for the control tokens, none for bos, and a tag: `sentencepiece` takes <s> for bos by default."""
    metadata = mistral_metadata() | {
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": not prefix,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 700,
        "tokenizer.ggml.padding_token_id": 701,
    }
    types = list(metadata["tokenizer.ggml.token_type"])
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types[701], tokens[702], types[702] = 3, "[REF]", 4
    metadata |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.tokens": tokens}
    back = load_tokenizer(export(metadata, tmp_path))
    same(tokenizer_from_gguf(metadata), back)
    assert (back.bos_id, back.eos_id, back.pad_id, back.special["[REF]"]) == (2, 700, 701, 702)
    del metadata["tokenizer.ggml.bos_token_id"]
    assert load_tokenizer(export(metadata, tmp_path)).bos_id is None


def convert(source: Path, out: Path, *words: str) -> int:
    return __main__.main(["convert", "--ckpt_dir", str(source), "--out_dir", str(out), *words])


def own_tokenizer(path: Path, tokenizer_path: Path | None = None) -> PieceTokenizer:
    """What a run takes."""
    reader = open_checkpoint(path)
    reader.close()
    given = None if tokenizer_path is None else str(tokenizer_path)
    found = read_tokenizer(RunConfig(str(path), tokenizer_path=given), reader)
    assert isinstance(found, PieceTokenizer)
    return found


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("llama-gqa", "hf"), ("llama-gqa", "meta"), ("llama-meta", "hf"), ("llama-meta", "meta"), ("qwen2", "hf")],
)
def test_convert_takes_a_ggufs_tokenizer_along(checkpoint: Saver, tmp_path: Path, name: str, fmt: str) -> None:
    source = checkpoint(name, "gguf-F32")
    assert convert(source, tmp_path / "out", "--format", fmt) == 0
    ours, back = own_tokenizer(source), own_tokenizer(tmp_path / "out")
    same(ours, back)
    assert encode_dialog(back, DIALOG, "template") == encode_dialog(ours, DIALOG, "template")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": tiny_tokenizer.BOS, "eos_token_id": [1, 3]}
    if fmt == "hf":
        theirs = in_transformers(tmp_path / "out")
        assert theirs.encode(LIBRARY_TEXTS[4]) == encode(ours, LIBRARY_TEXTS[4])
        assert chat_ids(theirs) == encode_dialog(ours, DIALOG, "template")


def test_a_gguf_serves_as_tokenizer_path(checkpoint: Saver, tmp_path: Path) -> None:
    bare, gguf = checkpoint("llama-mha", "meta1"), checkpoint("llama-mha", "gguf-F32")
    same(own_tokenizer(gguf), own_tokenizer(bare, gguf))
    assert convert(bare, tmp_path / "out", "--tokenizer_path", str(gguf)) == 0
    same(own_tokenizer(gguf), own_tokenizer(tmp_path / "out"))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="claims 293 items"):
        own_tokenizer(bare, damaged)
    assert convert(bare, tmp_path / "none", "--tokenizer_path", str(damaged)) == 2
    assert not (tmp_path / "none").exists()


def test_ids_of_a_meta_tokenizer_reach_the_configs(checkpoint: Saver, tmp_path: Path) -> None:
    source = checkpoint("llama-meta", "meta2")
    assert convert(source, tmp_path / "out") == 0
    tokenizer = own_tokenizer(source)
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())
        assert ids["bos_token_id"] == tokenizer.bos_id
        assert ids["eos_token_id"] == sorted(tokenizer.stop_ids)
    assert open_checkpoint(tmp_path / "out").config.eos_ids == tuple(sorted(tokenizer.stop_ids))


def test_ids_of_a_checkpoint_stay(checkpoint: Saver, tmp_path: Path) -> None:
    """The tokenizer knows a stop id more than the config, which keeps its own."""
    source = checkpoint("llama-gqa", "hf")
    assert convert(source, tmp_path / "out") == 0
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config


def test_weights_are_converted_without_a_tokenizer_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter.add_tokenizer_pre", lambda out, pre: out.add_string("tokenizer.ggml.pre", "odd"))
        source = tiny.save_gguf(tiny.CASES["llama-gqa"], tmp_path / "in.gguf")
    assert convert(source, tmp_path / "out") == 0
    assert "no tokenizer was written: GGUF metadata: tokenizer.ggml.pre is 'odd'" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_only_a_gguf_has_metadata(checkpoint: Saver, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"GG")
    assert read_metadata(tmp_path / "short") is None and read_metadata(tmp_path) is None
    assert read_metadata(tmp_path / "absent") is None
    found = read_metadata(checkpoint("llama-gqa", "gguf-F32"))
    assert found is not None and found["tokenizer.ggml.model"] == "gpt2"
