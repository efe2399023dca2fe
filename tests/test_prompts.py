"""Hybrid prompts: templates to tokens and slot positions (docs/method.md, section 1)."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rarec.config.method import Prompt
from rarec.errors import UserError
from rarec.prompts import Encoded, PromptPair, TextTokenizer, lay_out
from rarec.prompts.hybrid import parse_template
from tests.synthetic import tiny_tokenizer

CORPUS = ["Your task is to recommend the next product", "their purchase history: Geox Arno Sneaker, Casio Watch 12."]


def byte_level(**byte_level_options):
    """GPT-2's kind: a space belongs to the word behind it; nothing is put around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **byte_level_options})
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def sentence_piece():
    """Llama 2's kind: a space goes before every text, spaces become ▁, unknown characters bytes, and <s> is first."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    # no token has both a digit or a letter and a full stop, as none of Llama 2's has
    core.train_from_iterator([part for line in CORPUS * 9 for part in re.findall(r"\w+|[^\w\s]", line)], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>", pad_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level, own space": byte_level(add_prefix_space=True),
    "sentence piece": sentence_piece(),
    "encoder": tiny_tokenizer(encoder=True),
    "decoder": tiny_tokenizer(encoder=False),
}
TITLES = ["river lamp 0", "stone chair 1", "cloud shirt 2", "ember watch 3"]
WORDS = TOKENIZERS["encoder"]


def make_pair(tokenizer=WORDS, titles=TITLES, texts=None, slots=None, context_length=512, kind="decoder", **prompt):
    slots = slots or {"id": 3}
    texts = texts or [""] * len(titles)
    both = {"user": slots, "item": slots}
    prompt = {"user": "{history}", "item": "{title}. {text}"} | prompt
    return PromptPair(Prompt(**prompt), TextTokenizer(tokenizer), titles, texts, both, context_length, kind)


def words(encoded, tokenizer=WORDS):
    return " ".join(tokenizer.convert_ids_to_tokens(encoded.tokens_T.tolist()))


# ---- templates


def test_a_template_splits_into_text_fields_and_slots():
    parts = parse_template(
        "{soft:id} Seen before:\n{history}{soft:image} . Next?", ["history"], ["id", "image"], "here"
    )
    assert [(part.kind, part.value, part.spaced) for part in parts] == [
        ("soft", "id", False),
        ("text", "Seen before:\n", True),  # a line break stays; a space goes to what follows
        ("field", "history", False),
        ("soft", "image", False),
        ("text", ". Next?", True),
    ]


def test_a_space_skips_over_slots_and_is_used_once():
    parts = parse_template("on {soft:id}{title}{text}", ["title", "text"], ["id"], "here")
    assert [(part.value, part.spaced) for part in parts] == [
        ("on", False),
        ("id", True),
        ("title", True),
        ("text", False),
    ]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{titel}", "unknown field {titel}"),
        ("{Title}", "unknown field {Title}"),
        ("{soft:image} {title}", "unknown field {soft:image}"),
        ("{soft: id} {title}", "unknown field {soft: id}"),
        ("{soft} {title}", "unknown field {soft}"),
        ("{title:id}", "unknown field {title:id}"),
        ("{}", "unknown field {}"),
        ("{title}, {title}", "{title} is used twice"),
        ("{soft:id}{title}{soft:id}", "{soft:id} is used twice"),
        ("{title", "unmatched brace"),
        ("title} {text}", "unmatched brace"),
    ],
)
def test_faulty_templates_are_refused(template, problem):
    with pytest.raises(UserError) as caught:
        make_pair(item=template)
    assert caught.value.problem.startswith(f"prompt.item: {problem}")
    assert caught.value.remedy


# ---- filling, by hand


def test_a_user_prompt_by_hand():
    pair = make_pair(user="{soft:id} Your purchase history: {history}.")
    encoded = pair.user([0, 2])
    assert words(encoded) == "[CLS] Your purchase history : river lamp 0 , cloud shirt 2 . [SEP]"
    assert encoded.marks == {"id": 1}  # behind [CLS], before "Your"
    assert encoded.tokens_T.dtype == np.int32
    assert not encoded.cut


def test_an_item_prompt_by_hand():
    pair = make_pair(texts=["RIVER", "", "", ""], item="{title}. {soft:id} {text}")
    assert words(pair.item(0)) == "[CLS] river lamp 0 . RIVER [SEP]"
    assert pair.item(0).marks == {"id": 5}
    assert words(pair.item(1)) == "[CLS] stone chair 1 . [SEP]"


def test_special_tokens_are_those_of_the_tokenizer():
    def around(name, **how):
        text = TextTokenizer(TOKENIZERS[name], **how)
        return [TOKENIZERS[name].convert_ids_to_tokens(side.tolist()) for side in (text.prefix, text.suffix)]

    assert around("encoder") == [["[CLS]"], ["[SEP]"]]
    assert around("sentence piece") == [["<s>"], []]
    assert around("byte level") == [[], []]
    assert around("byte level", opens=True) == [["<eos>"], []]  # it has no token to begin with
    assert around("decoder", opens=True) == around("sentence piece", opens=True) == [["<s>"], []]
    assert around("encoder", opens=True) == around("encoder")
    assert TextTokenizer(TOKENIZERS["encoder"]).filler == TOKENIZERS["encoder"].pad_token_id
    assert TextTokenizer(TOKENIZERS["byte level"]).filler == TOKENIZERS["byte level"].eos_token_id  # it has no pad


@pytest.mark.parametrize("name", ["encoder", "byte level", "sentence piece"])
def test_what_reads_like_a_special_token_is_one_in_a_template_and_in_no_title(name):
    special = {"encoder": "[SEP]", "byte level": "<eos>", "sentence piece": "<s>"}[name]
    tokenizer = TOKENIZERS[name]
    pair = make_pair(tokenizer, titles=[f"lamp {special}"], user="{history}", item=f"{special} {{title}}")
    number = tokenizer.convert_tokens_to_ids(special)
    around = [*pair.tokenizer.prefix, *pair.tokenizer.suffix].count(number)
    assert pair.user([0]).tokens_T.tolist().count(number) == around
    assert pair.item(0).tokens_T.tolist().count(number) == around + 1


def test_a_prompt_without_any_token_is_a_full_stop():
    """Where the tokenizer puts nothing around a text: a prompt of slots alone, or a field that is empty."""
    tokenizer = TOKENIZERS["byte level"]
    pair = make_pair(tokenizer, user="{soft:id}", item="{soft:id} {text}", texts=["RIVER", "", "", ""])
    stop = tokenizer(".")["input_ids"]
    assert pair.user([0, 1]).tokens_T.tolist() == pair.item(1).tokens_T.tolist() == stop
    assert pair.item(0).tokens_T.tolist() == tokenizer(" RIVER")["input_ids"]


def test_a_history_is_written_oldest_first_and_only_its_newest():
    pair = make_pair(user="{soft:id} history: {history}", max_history=2)
    assert words(pair.user(np.array([3, 0, 1]))) == "[CLS] history : river lamp 0 , stone chair 1 [SEP]"
    assert words(pair.user([])) == "[CLS] history : [SEP]"
    assert pair.cut == {"user": 0, "item": 0}, "max_history is a choice, not a lack of room"


@pytest.mark.parametrize(
    ("kind", "order", "expected"),
    [
        ("encoder", "auto", "stone chair 1 , river lamp 0"),
        ("decoder", "newest_first", "stone chair 1 , river lamp 0"),
        ("encoder", "oldest_first", "river lamp 0 , stone chair 1"),
    ],
)
def test_an_encoder_gets_the_newest_title_first_and_whoever_asks_for_it(kind, order, expected):
    pair = make_pair(kind=kind, order=order, max_history=2)
    assert words(pair.user([3, 0, 1])) == f"[CLS] {expected} [SEP]"
    assert (pair.fingerprint == make_pair(max_history=2).fingerprint) == (not pair.newest_first)


def test_an_empty_text_adds_no_stray_space():
    pair = make_pair(TOKENIZERS["byte level"], titles=["Casio"], item="{soft:id}{title} {text}")
    assert pair.item(0).tokens_T.tolist() == TOKENIZERS["byte level"]("Casio")["input_ids"]


def test_one_tokenised_prompt_serves_text_only():
    """Without slots a prompt is the same text, so its stored states hold for every variant."""
    encoded = make_pair(user="{soft:id} history: {history}").user([0, 1])
    text_only, hybrid = lay_out([encoded], {}, 0), lay_out([encoded], {"id": 3}, 0)
    assert text_only.ids_BT[0].tolist() == encoded.tokens_T.tolist()
    assert np.delete(hybrid.ids_BT[0], hybrid.positions_BK[0]).tolist() == encoded.tokens_T.tolist()
    assert text_only.positions_BK.shape == (1, 0)


# ---- laying out


def test_slots_are_laid_out_by_hand():
    prompts = [Encoded(np.array([10, 11, 12], np.int32), {"id": 1}), Encoded(np.array([20, 21], np.int32), {"id": 0})]
    laid = lay_out(prompts, {"id": 2}, filler=9)
    assert laid.ids_BT.tolist() == [[10, 9, 9, 11, 12], [9, 9, 20, 21, 9]]
    assert laid.mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert laid.positions_BK.tolist() == [[1, 2], [0, 1]]


def test_several_sources_stand_where_the_template_says_and_come_in_the_models_order():
    slots = {"a": 1, "b": 2, "c": 1, "elsewhere": 4}
    pair = make_pair(slots=slots, item="{title} {soft:b}{soft:a}. {soft:c}", user="{soft:elsewhere} {history}")
    encoded = pair.item(0)
    assert words(encoded) == "[CLS] river lamp 0 . [SEP]"
    laid = lay_out([encoded], {"a": 1, "b": 2, "c": 1}, filler=0)
    #  0     1     2    3  4 5 6 7 8 9
    # [CLS] river lamp  0  b b a . c [SEP]
    assert laid.positions_BK.tolist() == [[6, 4, 5, 8]]  # a, b, b, c
    assert np.flatnonzero(laid.ids_BT[0] == 0).tolist() == [4, 5, 6, 8]
    assert pair.sources == {"user": ("elsewhere",), "item": ("b", "a", "c")}


def test_slots_at_titles_are_laid_out_by_hand():
    """The second prompt lacks a title: its slot is where every prompt has padding."""
    prompts = [
        Encoded(np.array([10, 11, 12], np.int32), {"id": 1, "id@titles": [1, 3]}),
        Encoded(np.array([20, 21], np.int32), {"id": 0, "id@titles": [1]}),
    ]
    laid = lay_out(prompts, {"id@titles": 2, "id": 1}, filler=9)
    assert laid.ids_BT.tolist() == [[10, 9, 9, 11, 12, 9, 9], [9, 20, 9, 21, 9, 9, 9]]
    assert laid.mask_BT.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert laid.positions_BK.tolist() == [[2, 5, 1], [2, 6, 0]]
    assert lay_out(prompts[:1], {"id@titles": 2}, filler=9).mask_BT.all()
    with pytest.raises(ValueError, match="no place"):
        lay_out(prompts, {"image": 1}, filler=9)


def test_items_of_a_history_have_slots_at_their_titles():
    title = "{soft:image} {title}: {soft:id}"
    pair = make_pair(slots={"id": 3, "image": 2}, user="{soft:id} history: {history}.", title=title)
    encoded = pair.user([3, 0, 2])
    assert words(encoded) == "[CLS] history : ember watch 3 : , river lamp 0 : , cloud shirt 2 : . [SEP]"
    #                           0      1    2   3     4   5 6 7   8    9  10 11 12 13    14  15 16 17
    assert encoded.marks == {"id": 1, "image@titles": [3, 8, 13], "id@titles": [7, 12, 17]}
    assert encoded.titles_H.tolist() == [3, 0, 2]
    assert pair.sources == {"user": ("id", "image@titles", "id@titles"), "item": ()}
    again = pair.stored(encoded.tokens_T, encoded.marks, np.array([1, 3, 0, 2], np.int32))
    assert again.titles_H.tolist() == [3, 0, 2]
    assert pair.user([]).marks == {"id": 1, "image@titles": [], "id@titles": []}


def test_vectors_may_stand_in_the_place_of_titles():
    pair = make_pair(title="{soft:id}", separator="", kind="encoder")
    encoded = pair.user([3, 0, 2])
    assert (words(encoded), encoded.marks, encoded.titles_H.tolist()) == (
        "[CLS] . [SEP]",
        {"id@titles": [1] * 3},
        [2, 0, 3],
    )


def test_slots_at_titles_leave_the_text_as_it_is_and_count_for_its_room():
    plain, marked = make_pair(), make_pair(title="{title} {soft:id}")
    assert marked.user([0, 1]).tokens_T.tolist() == plain.user([0, 1]).tokens_T.tolist()
    assert marked.item(0).tokens_T.tolist() == plain.item(0).tokens_T.tolist()
    history, room = [0, 1, 2, 3], 2 + 3 + 4 + 4  # three titles with separators
    assert plain.user([0]).marks == {}
    assert len(make_pair(max_tokens=room).user(history).titles_H) == 3
    cut = make_pair(max_tokens=room, title="{title} {soft:id}").user(history)
    assert (cut.titles_H.tolist(), cut.cut) == ([2, 3], True)
    assert make_pair(max_tokens=4, title="{title} {soft:id}").user([0]).marks == {"id@titles": [2]}


def test_slots_at_titles_need_a_history():
    with pytest.raises(UserError, match=r"prompt\.title .*\n.*\{history\}"):
        make_pair(user="{soft:id}", title="{title} {soft:id}")
    with pytest.raises(UserError, match=r"prompt\.title: unknown field \{text\}"):
        make_pair(title="{text}")


NAMES = ("a", "b", "c")
PROMPTS = st.lists(
    st.integers(1, 6).flatmap(
        lambda length: st.builds(
            lambda tokens, marks: Encoded(np.array(tokens, np.int32), marks),
            st.lists(st.integers(1, 99), min_size=length, max_size=length),
            st.permutations(NAMES).flatmap(
                lambda order: st.fixed_dictionaries({name: st.integers(0, length) for name in order})
            ),
        )
    ),
    min_size=1,
    max_size=4,
)


@given(PROMPTS, st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)))
def test_any_layout_keeps_text_and_gives_every_source_its_places(prompts, slots):
    laid = lay_out(prompts, slots, filler=0)
    total = sum(slots.values())
    assert laid.positions_BK.shape == (len(prompts), total)
    for row, prompt in enumerate(prompts):
        length = int(laid.mask_BT[row].sum())
        assert length == len(prompt.tokens_T) + total
        assert not laid.mask_BT[row, length:].any()
        assert not laid.ids_BT[row, length:].any()
        assert np.delete(laid.ids_BT[row, :length], laid.positions_BK[row]).tolist() == prompt.tokens_T.tolist()
        assert not laid.ids_BT[row, laid.positions_BK[row]].any()
        at = 0
        for source, count in slots.items():
            own = laid.positions_BK[row, at : at + count]
            at += count
            is_slot = np.isin(np.arange(length), laid.positions_BK[row])
            assert (np.diff(own) == 1).all()
            if count:
                assert (~is_slot[: own[0]]).sum() == prompt.marks[source]


# ---- pieces and the whole

TEXT = st.lists(st.from_regex(r"[a-zA-Z]{1,6}|[0-9]{1,4}", fullmatch=True), min_size=1, max_size=4).map(" ".join)
LONG = {"max_title_tokens": 200, "max_text_tokens": 400}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(titles=st.lists(TEXT, min_size=1, max_size=4))
@settings(max_examples=40)
def test_pieces_give_the_tokens_of_the_whole_text(name, titles):
    tokenizer = TOKENIZERS[name]
    pair = make_pair(tokenizer, titles, ["Watch 12"] * len(titles), user="purchase history: {history}.", **LONG)
    whole = tokenizer(f"purchase history: {', '.join(titles)}.")["input_ids"]
    assert pair.user(range(len(titles))).tokens_T.tolist() == whole
    assert pair.item(0).tokens_T.tolist() == tokenizer(f"{titles[0]}. Watch 12")["input_ids"]


@pytest.mark.parametrize("name", ["byte level", "sentence piece"])
def test_line_breaks_of_a_template_and_a_separator_are_kept(name):
    tokenizer = TOKENIZERS[name]
    pair = make_pair(tokenizer, ["Geox", "Casio"], user="history:\n{history}\nNext: {soft:id}", separator="\n")
    assert pair.user([0, 1]).tokens_T.tolist() == tokenizer("history:\nGeox\nCasio\nNext:")["input_ids"]


# ---- when there is no room

TIGHT = {"user": "{soft:id} history: {history}."}  # [CLS] history : . [SEP] and 3 slots: 8 tokens are fixed


@pytest.mark.parametrize(
    ("max_tokens", "expected", "cut"),
    [
        (19, "river lamp 0 , stone chair 1 , cloud shirt 2", 0),  # 8 + 11, to the token
        (18, "stone chair 1 , cloud shirt 2", 1),
        (15, "stone chair 1 , cloud shirt 2", 1),  # 8 + 7
        (14, "cloud shirt 2", 1),
        (11, "cloud shirt 2", 1),
        (10, "cloud shirt", 1),  # even the newest title does not fit
        (9, "cloud", 1),
    ],
)
def test_the_oldest_titles_go_and_never_slots_or_fixed_text(max_tokens, expected, cut):
    pair = make_pair(**TIGHT, max_tokens=max_tokens)
    encoded = pair.user([0, 1, 2])
    assert words(encoded) == f"[CLS] history : {expected} . [SEP]"
    assert encoded.cut == bool(cut)
    assert pair.cut == {"user": cut, "item": 0}
    assert lay_out([encoded], {"id": 3}, 0).ids_BT.shape[1] <= max_tokens


@pytest.mark.parametrize("max_tokens", range(9, 20))
def test_the_oldest_titles_go_where_the_newest_stands_first_too(max_tokens):
    titles = ["cloud shirt 2", "stone chair 1", "river lamp 0"]
    oldest_first = make_pair(**TIGHT, max_tokens=max_tokens).user([0, 1, 2])
    encoded = make_pair(**TIGHT, max_tokens=max_tokens, order="newest_first").user([0, 1, 2])
    assert encoded.cut == oldest_first.cut
    assert sorted(words(encoded)) == sorted(words(oldest_first)), "the same titles, in the other order"
    assert words(encoded).removeprefix("[CLS] history : ").startswith(titles[0][: 5 if max_tokens < 11 else 13])


def test_the_models_context_is_a_limit_too():
    assert words(make_pair(**TIGHT, max_tokens=500, context_length=14).user([0, 1])).count("stone") == 1
    assert words(make_pair(**TIGHT, max_tokens=500, context_length=14).user([0, 1])).count("river") == 0


def test_no_room_at_all_is_refused():
    with pytest.raises(UserError, match=r"prompt\.user: .* 8 of 8 tokens") as caught:
        make_pair(**TIGHT, max_tokens=8)
    assert "alignment.instructions" in caught.value.remedy


def test_an_item_loses_its_further_text_first():
    def item(**limits):
        pair = make_pair(texts=["RIVER STONE CLOUD"] * 4, item="{soft:id} {title}: {text}.", **limits)
        return words(pair.item(0)), pair.cut["item"]

    assert item() == ("[CLS] river lamp 0 : RIVER STONE CLOUD . [SEP]", 0)
    assert item(max_tokens=12) == ("[CLS] river lamp 0 : RIVER STONE . [SEP]", 1)  # 3 slots and 9 tokens
    assert item(max_tokens=9) == ("[CLS] river lamp : . [SEP]", 1)
    assert item(max_text_tokens=4) == ("[CLS] river lamp 0 : RIVER . [SEP]", 0)
    assert item(max_text_tokens=2) == ("[CLS] river lamp : . [SEP]", 0)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(9, 60), st.sampled_from(["encoder", "decoder"]))
def test_whatever_the_history_the_prompt_fits_and_its_end_is_there(history, max_tokens, name):
    pair = make_pair(TOKENIZERS[name], **TIGHT, max_tokens=max_tokens)
    encoded = pair.user(history)
    told = words(encoded, TOKENIZERS[name])
    assert lay_out([encoded], {"id": 3}, 0).ids_BT.shape[1] <= max_tokens
    whole = make_pair(TOKENIZERS[name], **TIGHT).user(history)
    assert encoded.cut == (encoded.tokens_T.tolist() != whole.tokens_T.tolist())
    body = told.split(" : ")[1].split(" .")[0]
    titles = [TITLES[item] for item in history[-10:]]
    tails = [" , ".join(titles[start:]) for start in range(len(titles))]
    assert body in tails or (titles and titles[-1].startswith(body)) or not history


def test_the_fingerprint_tells_templates_and_tokenizers_apart():
    prints = {
        make_pair().fingerprint,
        make_pair(item="{text}").fingerprint,
        make_pair(max_history=3).fingerprint,
        make_pair(TOKENIZERS["decoder"]).fingerprint,
    }
    assert len(prints) == 4
    assert make_pair(titles=["another"]).fingerprint in prints, "the catalogue is the dataset's business"
