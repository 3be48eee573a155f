import json
import random
import threading

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helixd.errors import ModelError
from helixd.model.checkpoint import resolve_model
from helixd.model.token_bytes import TokenDecoder
from helixd.model.tokenizer import IncrementalDetokenizer, Tokenizer

CORPUS = [
    "def main(): return 'hello world'",
    "naïve café 🙂👩‍👩‍👧 Straße, 中文字符",
    "  indented\n\tlines\r\n",
    "1234567890",
] * 20
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<s>", "</s>"]


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def fallback_bpe():
    """As Llama 2 and Mistral: metaspace, byte fallback, the leading space stripped."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", *SPECIALS, *BYTE_TOKENS])
    trained.train_from_iterator(["plain ascii words only, def return"] * 10, trainer)
    model = json.loads(trained.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", *SPECIALS])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def fallback_unigram():
    """As Gemma: no leading space is added, so none is stripped."""
    vocab = [("<unk>", 0.0), *((token, -9.0) for token in BYTE_TOKENS)]
    vocab += [(piece, -3.0) for piece in ("▁", "▁hello", "hello", "▁world", "a", "b", "é", ",", "▁▁")]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.add_special_tokens(["<unk>", *SPECIALS])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def metaspace_unigram():
    vocab = [("<unk>", 0.0), *((piece, -3.0) for piece in ("▁", "▁hello", "hello", "▁world", "a", "b", "é", ","))]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.add_special_tokens(["<unk>", *SPECIALS])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


BUILDERS = {
    "byte_level": byte_level,
    "fallback_bpe": fallback_bpe,
    "fallback_unigram": fallback_unigram,
    "metaspace": metaspace_unigram,
}


def save(backend, model_dir, settings_=None):
    model_dir.mkdir(exist_ok=True)
    (model_dir / "tokenizer.json").write_text(backend.to_str())
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} if settings_ is None else settings_)
    )
    return model_dir


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    backends = {name: build() for name, build in BUILDERS.items()}
    return {name: (Tokenizer.load(save(backend, root / name)), backend) for name, backend in backends.items()}


def stream(tokenizer, ids, prompt_ids=(), **options):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, **options)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


TEXTS = [
    "hello world",
    "  two spaces",
    "naïve café 🙂 👩‍👩‍👧 Straße 中文字符",
    "line\n\ttab\r\n",
    "",
    " ",
    "🙂🙂🙂",
    "a\x00b",
    "﻿bom",
]


@pytest.mark.parametrize("name", ["byte_level", "fallback_bpe", "fallback_unigram"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_lossless(loaded, name, text):
    tokenizer, backend = loaded[name]
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids) == text == backend.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("name", ["byte_level", "fallback_bpe", "fallback_unigram"])
def test_any_text_streams_to_itself_without_splitting_characters(loaded, name, text):
    tokenizer, backend = loaded[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == backend.decode(ids)
    assert "�" in text or "�" not in "".join(pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", BUILDERS)
def test_any_ids_decode_as_the_library_decodes_them(loaded, name, data):
    """Byte fallback runs are kept valid here; what happens to invalid ones is stated in its own test."""
    tokenizer, backend = loaded[name]
    vocab = backend.get_vocab()
    allowed = sorted(i for token, i in vocab.items() if name == "byte_level" or not token.startswith("<0x"))
    ids = data.draw(st.lists(st.sampled_from(allowed), max_size=12))
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


def test_invalid_bytes_become_one_replacement_per_broken_character(loaded):
    tokenizer, backend = loaded["fallback_bpe"]
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in b"\xf0\x9f\x99\x82\x80"]
    assert tokenizer.decode(ids) == "🙂�"
    assert stream(tokenizer, ids) == ["", "", "", "🙂", "�", ""]
    assert stream(tokenizer, ids[:2]) == ["", "", "�"]
    plain = tokenizer.encode("plain", add_special_tokens=False)
    assert "".join(stream(tokenizer, [*ids[:2], *plain])) == "� plain"


def test_a_thousand_invalid_bytes_are_passed_on_as_they_come(loaded):
    tokenizer, backend = loaded["byte_level"]
    broken = backend.token_to_id("Ģ")
    assert tokenizer.token_bytes(broken) == b"\x80"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert all(detokenizer.feed(broken) == "�" for _ in range(1000))


def test_token_bytes_are_what_a_token_adds(loaded):
    for name in ("byte_level", "fallback_bpe", "fallback_unigram"):
        tokenizer, _ = loaded[name]
        text = "hello 🙂 world"
        joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
        assert joined.decode().removeprefix(" ") == text
        assert tokenizer.token_bytes(10**6) == b""
        assert tokenizer.token_bytes(-1) == b""


def test_generated_text_keeps_the_space_that_only_a_texts_start_drops(loaded):
    tokenizer, _ = loaded["fallback_bpe"]
    word = tokenizer.encode("words", add_special_tokens=False)
    bos = tokenizer.bos_ids
    assert "".join(stream(tokenizer, word)) == "words"
    assert "".join(stream(tokenizer, word, prompt_ids=bos)) == "words"
    assert "".join(stream(tokenizer, word, prompt_ids=[*bos, *word])) == " words"


def test_a_character_begun_in_the_prompt_is_completed(loaded):
    tokenizer, backend = loaded["fallback_bpe"]
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert "".join(stream(tokenizer, ids[2:], prompt_ids=ids[:2])) == "🙂"


def test_special_tokens_are_skipped_or_shown(loaded):
    tokenizer, backend = loaded["byte_level"]
    ids = [*tokenizer.bos_ids, *tokenizer.encode("hi"), *tokenizer.eos_ids]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hi</s>"
    assert tokenizer.special_ids == {backend.token_to_id(token) for token in SPECIALS}
    assert dict(tokenizer.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.vocab_size == backend.get_vocab_size() == 1 + max(backend.get_vocab().values())


def test_bos_is_added_by_the_tokenizers_own_post_processor(tmp_path):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = Tokenizer.load(save(backend, tmp_path))
    assert tokenizer.encode("hi")[:1] == list(tokenizer.bos_ids)
    assert tokenizer.encode("hi", add_special_tokens=False) == tokenizer.encode("hi")[1:]


def test_truncation_and_padding_saved_in_the_file_are_ignored(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    ids = Tokenizer.load(save(backend, tmp_path)).encode("hello world and more")
    assert Tokenizer.load(tmp_path).decode(ids) == "hello world and more"


def test_tokens_that_only_the_settings_declare_are_added(tmp_path):
    backend = byte_level()
    size = backend.get_vocab_size()
    added = {str(size): {"content": "<|im_end|>", "special": True}, str(size + 1): {"content": "<tool>"}}
    tokenizer = Tokenizer.load(save(backend, tmp_path, {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}))
    assert tokenizer.encode("hi<|im_end|>")[-1:] == [size] == list(tokenizer.eos_ids)
    assert tokenizer.decode([size, size + 1]) == "<tool>"
    added[str(size + 7)] = {"content": "<|late|>", "special": True}
    with pytest.raises(ModelError, match=r"disagree about the id of '<\|late\|>'"):
        Tokenizer.load(save(backend, tmp_path, {"added_tokens_decoder": added}))


def test_older_special_tokens_map(tmp_path):
    save(byte_level(), tmp_path, {})
    assert Tokenizer.load(tmp_path).eos_ids == ()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert len(Tokenizer.load(tmp_path).eos_ids) == 1


def test_lone_surrogates_are_a_value_error(loaded):
    tokenizer, _ = loaded["byte_level"]
    with pytest.raises(ValueError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"decoder": {"type": "ByteLevel"}}', '{"decoder": null}'])
def test_a_tokenizer_that_is_none(tmp_path, content):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        decoders.Sequence([]),
    ],
)
def test_decoders_that_cannot_be_taken_apart_are_refused(decoder):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoder
    with pytest.raises(ModelError, match="is not supported"):
        TokenDecoder.parse(json.loads(backend.to_str())["decoder"])


def test_added_tokens_with_characters_outside_the_byte_alphabet(tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("  "), AddedToken("→中")])
    tokenizer = Tokenizer.load(save(backend, tmp_path))
    ids = tokenizer.encode("a  b→中")
    assert tokenizer.decode(ids) == backend.decode(ids) == "a  b→中"


def test_random_ids_of_the_whole_vocabulary_stream_like_they_decode(loaded):
    rng = random.Random(7)
    for tokenizer, _ in loaded.values():
        for _ in range(50):
            ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(40)]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = Tokenizer.load(resolve_model("demo"))
    begun, ended = threading.Event(), threading.Event()

    def work():
        begun.set()
        tokenizer.encode("some words " * 50_000)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    turns = 0
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5
